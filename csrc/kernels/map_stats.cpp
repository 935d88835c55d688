// CPU: a thread takes a group of neighbouring maps and walks down their rows; three rows of each are at hand as floats,
// straight from memory where they lie contiguous, else through a small ring that also serves channels_last with whole
// cache lines. The Sobel kernel is separable: a column pass gives smoothed and difference rows, a row pass the rest.
#include "map_stats.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace vss {
namespace {

constexpr int64_t kGroup = 16;  // maps of a group: one cache line of channels_last floats
constexpr int64_t kRing = 3;

// Sums of one row. `smooth` and `differ` are scratch of width + 2.
VSS_CLONES void add_row(const float* __restrict up, const float* __restrict mid, const float* __restrict down,
                        int64_t width, bool zero_padding, float* __restrict smooth, float* __restrict differ,
                        MapSums<double>* sums) {
    for (int64_t x = 0; x < width; ++x) {
        smooth[x + 1] = 0.5f * (up[x] + down[x]) + mid[x];
        differ[x + 1] = down[x] - up[x];
    }
    smooth[0] = zero_padding ? 0.0f : smooth[1];
    differ[0] = zero_padding ? 0.0f : differ[1];
    smooth[width + 1] = zero_padding ? 0.0f : smooth[width];
    differ[width + 1] = zero_padding ? 0.0f : differ[width];
    float positive = 0.0f, negative = 0.0f, square = 0.0f, edge = 0.0f, edge_square = 0.0f;
#pragma omp simd reduction(+ : positive, negative, square, edge, edge_square)
    for (int64_t x = 0; x < width; ++x) {
        const float value = mid[x];
        positive += value < 0.0f ? 0.0f : value;
        negative += value > 0.0f ? 0.0f : -value;
        square += value * value;
        const float gx = smooth[x + 2] - smooth[x];
        const float gy = 0.5f * (differ[x] + differ[x + 2]) + differ[x + 1];
        const float strength = gx * gx + gy * gy;
        edge += std::sqrt(strength);
        edge_square += strength;
    }
    sums->positive += static_cast<double>(positive);
    sums->negative += static_cast<double>(negative);
    sums->square += static_cast<double>(square);
    sums->edge += static_cast<double>(edge);
    sums->edge_square += static_cast<double>(edge_square);
}

// The ring: rows y % kRing of up to kGroup maps, as floats.
template <typename T>
struct Ring {
    const MapStatsParams& p;
    const T* first;  // row 0 of the group's first map
    int64_t maps;
    float* rows;

    float* row(int64_t map, int64_t y) const { return rows + ((y % kRing) * kGroup + map) * p.width; }

    void fill(int64_t y) const {
        const T* source = first + y * p.stride_h;
        if (p.stride_c < p.stride_w) {
            for (int64_t x = 0; x < p.width; ++x)
                for (int64_t c = 0; c < maps; ++c) row(c, y)[x] = to_float(source[x * p.stride_w + c * p.stride_c]);
            return;
        }
        for (int64_t c = 0; c < maps; ++c)
            for (int64_t x = 0; x < p.width; ++x) row(c, y)[x] = to_float(source[x * p.stride_w + c * p.stride_c]);
    }
};

// Row(map, y) gives a row inside the map; padding rows are made here.
template <typename Row>
void walk_row(const MapStatsParams& p, int64_t maps, int64_t y, const Row& row, const float* zeros, float* scratch,
              MapSums<double>* sums) {
    for (int64_t c = 0; c < maps; ++c) {
        const float* mid = row(c, y);
        const float* border = p.zero_padding ? zeros : mid;
        const float* up = y > 0 ? row(c, y - 1) : border;
        const float* down = y + 1 < p.height ? row(c, y + 1) : border;
        add_row(up, mid, down, p.width, p.zero_padding, scratch, scratch + p.width + 2, &sums[c]);
    }
}

template <typename T>
void group(const MapStatsParams& p, int64_t n, int64_t first_channel, float* workspace) {
    const int64_t maps = std::min(kGroup, p.channels - first_channel);
    const T* first = static_cast<const T*>(p.maps) + n * p.stride_n + first_channel * p.stride_c;
    float* zeros = workspace;
    float* scratch = zeros + p.width;
    std::fill(zeros, zeros + p.width, 0.0f);
    MapSums<double> sums[kGroup] = {};
    if constexpr (std::is_same_v<T, float>) {
        if (p.stride_w == 1 || p.width == 1) {
            const auto direct = [&](int64_t c, int64_t y) { return first + c * p.stride_c + y * p.stride_h; };
            for (int64_t c = 0; c < maps; ++c)
                for (int64_t y = 0; y < p.height; ++y)
                    walk_row(p, 1, y, [&](int64_t, int64_t at) { return direct(c, at); }, zeros, scratch, &sums[c]);
            for (int64_t c = 0; c < maps; ++c)
                sums[c].store(p.stats + (n * p.channels + first_channel + c) * kMapStats);
            return;
        }
    }
    const Ring<T> ring{p, first, maps, scratch + 2 * (p.width + 2)};
    ring.fill(0);
    for (int64_t y = 0; y < p.height; ++y) {
        if (y + 1 < p.height) ring.fill(y + 1);
        walk_row(p, maps, y, [&](int64_t c, int64_t at) { return ring.row(c, at); }, zeros, scratch, sums);
    }
    for (int64_t c = 0; c < maps; ++c) sums[c].store(p.stats + (n * p.channels + first_channel + c) * kMapStats);
}

int64_t workspace_per_thread(const MapStatsParams& p) {
    return p.width + 2 * (p.width + 2) + kRing * kGroup * p.width;
}

template <typename T>
void run(const MapStatsParams& p) {
    const int64_t groups = ceil_div(p.channels, kGroup), tasks = p.batch * groups;
#pragma omp parallel for schedule(dynamic) num_threads(p.threads) if (p.threads > 1 && tasks > 1)
    for (int64_t task = 0; task < tasks; ++task) {
        group<T>(p, task / groups, task % groups * kGroup, p.workspace + thread_index() * workspace_per_thread(p));
    }
}

}  // namespace

int64_t map_stats_workspace(const MapStatsParams& p) {
    return p.threads * workspace_per_thread(p);
}

Status map_stats_cpu(const MapStatsParams& p) {
    if (p.threads < 1 || p.height < 1 || p.width < 1) return Status::bad_argument;
    switch (p.dtype) {
        case DType::f32:
            run<float>(p);
            return Status::ok;
        case DType::f16:
            run<Half>(p);
            return Status::ok;
        case DType::bf16:
            run<BFloat16>(p);
            return Status::ok;
    }
    return Status::bad_argument;
}

}  // namespace vss
