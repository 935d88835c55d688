// CUDA: threads walk down the rows with a 3x3 window in registers, so that each element is fetched from memory once and
// its neighbours come from the first-level cache. Lanes run along the contiguous axis: columns, or channels for
// channels_last. Per-thread sums are float over a few rows, everything after that is double.
#include "common.cuh"
#include "map_stats_tile.h"

namespace vss {
namespace {

constexpr int64_t kMaxBlocks = 2147483647;
constexpr int kSums = 5;

using Sums = MapSums<float>;

// A map seen through the padding.
template <typename T>
struct PaddedMap {
    const MapStatsParams& p;
    const T* data;

    __device__ __forceinline__ PaddedMap(const MapStatsParams& params, const T* maps, int64_t n, int64_t c)
        : p(params), data(maps + n * params.stride_n + c * params.stride_c) {}

    __device__ __forceinline__ float operator()(int64_t y, int64_t x) const {
        const int64_t offset = padded_offset(p, y, x);
        return offset < 0 ? 0.0f : load(data + offset);
    }
};

// One block per map; its threads form `columns` (a power of two) times kStatsThreads / columns bands of rows.
template <typename T>
__global__ void __launch_bounds__(kStatsThreads) column_lanes(MapStatsParams p, const T* maps, int columns) {
    const int64_t n = blockIdx.x / p.channels, c = blockIdx.x % p.channels;
    const StatsBand band = stats_band(static_cast<int>(threadIdx.x), columns, p.height);
    Sums sums{};
    if (band.first < band.last) {
        const PaddedMap<T> map(p, maps, n, c);
        for (int64_t x = band.column; x < p.width; x += columns) walk_down(map, x, band.first, band.last, sums);
    }
    double totals[kSums] = {sums.positive, sums.negative, sums.square, sums.edge, sums.edge_square};
    __shared__ double partial[kStatsWarps][kSums];
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
        for (int step = 16; step > 0; step /= 2) totals[s] += __shfl_down_sync(0xffffffffu, totals[s], step);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32][s] = totals[s];
    }
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int w = 1; w < kStatsWarps; ++w)
        for (int s = 0; s < kSums; ++s) partial[0][s] += partial[w][s];
    const MapSums<double> sum{partial[0][0], partial[0][1], partial[0][2], partial[0][3], partial[0][4]};
    sum.store(p.stats + blockIdx.x * int64_t{kMapStats});
}

// One block per 32 channels of an image: a lane is a channel, a warp takes every kStatsWarps-th column.
template <typename T>
__global__ void __launch_bounds__(kStatsThreads) channel_lanes(MapStatsParams p, const T* maps) {
    const int64_t groups = ceil_div(p.channels, 32), n = blockIdx.x / groups;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t c = blockIdx.x % groups * 32 + lane;
    Sums sums{};
    if (c < p.channels) {
        const PaddedMap<T> map(p, maps, n, c);
        for (int64_t x = warp; x < p.width; x += kStatsWarps) walk_down(map, x, 0, p.height, sums);
    }
    __shared__ Sums partial[kStatsWarps][32];
    partial[warp][lane] = sums;
    __syncthreads();
    if (warp > 0 || c >= p.channels) return;
    MapSums<double> sum{};
    for (int w = 0; w < kStatsWarps; ++w) {
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
    visit_dtype(p.maps, p.dtype, [&](auto* maps) {
        if (stats_by_channel(p)) {
            const auto blocks = static_cast<unsigned>(p.batch * ceil_div(p.channels, 32));
            channel_lanes<<<blocks, kStatsThreads, 0, stream>>>(p, maps);
        } else {
            column_lanes<<<static_cast<unsigned>(p.batch * p.channels), kStatsThreads, 0, stream>>>(
                p, maps, stats_columns(p.width));
        }
    });
    return launch_status();
}

}  // namespace vss
