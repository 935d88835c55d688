// CUDA: threads walk down the rows with a 3x3 window in registers, so that each element is fetched from memory once and
// its neighbours come from the first-level cache. Lanes run along the contiguous axis: columns, or channels for
// channels_last. Per-thread sums are float over a few rows, everything after that is double.
#include "common.cuh"
#include "map_stats.h"

namespace vss {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kMaxBlocks = 2147483647;
constexpr int kSums = 5;

using Sums = MapSums<float>;

// A map seen through the padding.
template <typename T>
struct PaddedMap {
    const T* data;
    int64_t height, width, stride_h, stride_w;
    bool zero_padding;

    __device__ __forceinline__ float operator()(int64_t y, int64_t x) const {
        const bool inside = y >= 0 && y < height && x >= 0 && x < width;
        if (!inside && zero_padding) return 0.0f;
        y = y < 0 ? 0 : (y < height ? y : height - 1);
        x = x < 0 ? 0 : (x < width ? x : width - 1);
        return load(data + y * stride_h + x * stride_w);
    }
};

struct WindowRow {
    float left, mid, right;
};

template <typename Map>
__device__ __forceinline__ WindowRow window_row(const Map& map, int64_t y, int64_t x) {
    return {map(y, x - 1), map(y, x), map(y, x + 1)};
}

__device__ __forceinline__ void add(Sums& sums, const WindowRow& up, const WindowRow& mid, const WindowRow& down) {
    const float value = mid.mid;
    sums.positive += value < 0.0f ? 0.0f : value;
    sums.negative += value > 0.0f ? 0.0f : -value;
    sums.square += value * value;
    const float gx = 0.5f * (up.right - up.left + down.right - down.left) + (mid.right - mid.left);
    const float gy = 0.5f * (down.left - up.left + down.right - up.right) + (down.mid - up.mid);
    const float strength = gx * gx + gy * gy;
    sums.edge += sqrtf(strength);
    sums.edge_square += strength;
}

// Column x from row `first` to before row `last`.
template <typename Map>
__device__ __forceinline__ void walk_down(const Map& map, int64_t x, int64_t first, int64_t last, Sums& sums) {
    WindowRow up = window_row(map, first - 1, x), mid = window_row(map, first, x);
    for (int64_t y = first; y < last; ++y) {
        const WindowRow down = window_row(map, y + 1, x);
        add(sums, up, mid, down);
        up = mid;
        mid = down;
    }
}

template <typename T>
__device__ __forceinline__ PaddedMap<T> map_of(const MapStatsParams& p, const T* maps, int64_t n, int64_t c) {
    return {maps + n * p.stride_n + c * p.stride_c, p.height, p.width, p.stride_h, p.stride_w, p.zero_padding};
}

// One block per map; its threads form `columns` (a power of two) times kThreads / columns bands of rows.
template <typename T>
__global__ void __launch_bounds__(kThreads) column_lanes(MapStatsParams p, const T* maps, int columns) {
    const int64_t n = blockIdx.x / p.channels, c = blockIdx.x % p.channels;
    const int bands = kThreads / columns;
    const int64_t rows = ceil_div(p.height, bands), first = threadIdx.x / columns * rows;
    const int64_t last = first + rows < p.height ? first + rows : p.height;
    Sums sums{};
    if (first < last) {
        const auto map = map_of(p, maps, n, c);
        for (int64_t x = threadIdx.x % columns; x < p.width; x += columns) walk_down(map, x, first, last, sums);
    }
    double totals[kSums] = {sums.positive, sums.negative, sums.square, sums.edge, sums.edge_square};
    __shared__ double partial[kWarps][kSums];
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
        for (int step = 16; step > 0; step /= 2) totals[s] += __shfl_down_sync(0xffffffffu, totals[s], step);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32][s] = totals[s];
    }
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int w = 1; w < kWarps; ++w)
        for (int s = 0; s < kSums; ++s) partial[0][s] += partial[w][s];
    const MapSums<double> sum{partial[0][0], partial[0][1], partial[0][2], partial[0][3], partial[0][4]};
    sum.store(p.stats + blockIdx.x * int64_t{kMapStats});
}

// One block per 32 channels of an image: a lane is a channel, a warp takes every kWarps-th column.
template <typename T>
__global__ void __launch_bounds__(kThreads) channel_lanes(MapStatsParams p, const T* maps) {
    const int64_t groups = ceil_div(p.channels, 32), n = blockIdx.x / groups;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t c = blockIdx.x % groups * 32 + lane;
    Sums sums{};
    if (c < p.channels) {
        const auto map = map_of(p, maps, n, c);
        for (int64_t x = warp; x < p.width; x += kWarps) walk_down(map, x, 0, p.height, sums);
    }
    __shared__ Sums partial[kWarps][32];
    partial[warp][lane] = sums;
    __syncthreads();
    if (warp > 0 || c >= p.channels) return;
    MapSums<double> sum{};
    for (int w = 0; w < kWarps; ++w) {
        const Sums& part = partial[w][lane];
        sum.positive += part.positive, sum.negative += part.negative, sum.square += part.square;
        sum.edge += part.edge, sum.edge_square += part.edge_square;
    }
    sum.store(p.stats + (n * p.channels + c) * kMapStats);
}

}  // namespace

Status map_stats_cuda(const MapStatsParams& p, CUstream_st* stream) {
    if (p.height < 1 || p.width < 1 || p.batch * p.channels > kMaxBlocks) return Status::bad_argument;
    if (p.batch * p.channels == 0) return Status::ok;
    const bool by_channel = p.stride_c < p.stride_w && p.channels >= 16;
    int columns = 32;
    while (columns < p.width && columns < kThreads) columns *= 2;
    visit_dtype(p.maps, p.dtype, [&](auto* maps) {
        if (by_channel) {
            const auto blocks = static_cast<unsigned>(p.batch * ceil_div(p.channels, 32));
            channel_lanes<<<blocks, kThreads, 0, stream>>>(p, maps);
        } else {
            column_lanes<<<static_cast<unsigned>(p.batch * p.channels), kThreads, 0, stream>>>(p, maps, columns);
        }
    });
    return launch_status();
}

}  // namespace vss
