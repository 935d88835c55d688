// CPU: a thread takes a group of neighbouring maps and walks down their rows; three rows of each are at hand as floats,
// straight from memory where they lie contiguous, else through a small ring. A full group of channels_last maps is one
// vector a pixel, and its lanes are the maps; everything else runs along the row. The Sobel kernel is separable: a
// column pass gives smoothed and difference rows, a row pass the rest.
#include "map_stats.h"

#include <algorithm>
#include <cmath>
#include <cstring>
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

// One pixel of a full channels_last group. Memory is read and written by memcpy, so no alignment is assumed, and no
// vector crosses a function boundary.
typedef float Lanes __attribute__((vector_size(kGroup * sizeof(float))));

struct PixelRow {
    const float* first;
    int64_t step;  // floats from one pixel to the next; 0 repeats the first
};

// Sums of one row of kGroup maps at once.
VSS_CLONES void add_pixels(PixelRow up, PixelRow mid, PixelRow down, int64_t width, bool zero_padding,
                           MapSums<double>* sums) {
    const Lanes zero = {};
    Lanes positive = {}, negative = {}, square = {}, edge = {}, edge_square = {};
    Lanes above, value, below, next_value = {};
    std::memcpy(&above, up.first, sizeof above);
    std::memcpy(&value, mid.first, sizeof value);
    std::memcpy(&below, down.first, sizeof below);
    Lanes smooth = 0.5f * (above + below) + value, differ = below - above;
    Lanes smooth_before = zero_padding ? zero : smooth, differ_before = zero_padding ? zero : differ;
    for (int64_t x = 0; x < width; ++x) {
        Lanes smooth_after = zero_padding ? zero : smooth, differ_after = zero_padding ? zero : differ;
        if (x + 1 < width) {
            std::memcpy(&above, up.first + (x + 1) * up.step, sizeof above);
            std::memcpy(&next_value, mid.first + (x + 1) * mid.step, sizeof next_value);
            std::memcpy(&below, down.first + (x + 1) * down.step, sizeof below);
            smooth_after = 0.5f * (above + below) + next_value;
            differ_after = below - above;
        }
        positive += value < 0.0f ? zero : value;
        negative += value > 0.0f ? zero : -value;
        square += value * value;
        const Lanes gx = smooth_after - smooth_before;
        const Lanes gy = 0.5f * (differ_before + differ_after) + differ;
        const Lanes strength = gx * gx + gy * gy;
        Lanes root;
        for (int64_t c = 0; c < kGroup; ++c) root[c] = std::sqrt(strength[c]);
        edge += root;
        edge_square += strength;
        smooth_before = smooth, smooth = smooth_after;
        differ_before = differ, differ = differ_after;
        value = next_value;
    }
    for (int64_t c = 0; c < kGroup; ++c) {
        sums[c].positive += static_cast<double>(positive[c]);
        sums[c].negative += static_cast<double>(negative[c]);
        sums[c].square += static_cast<double>(square[c]);
        sums[c].edge += static_cast<double>(edge[c]);
        sums[c].edge_square += static_cast<double>(edge_square[c]);
    }
}

// Templates are compiled for the baseline alone, so what must be fast in them is a function of its own.
VSS_CLONES void widen(const BFloat16* __restrict source, int64_t count, float* __restrict out) {
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(source[i]);
}
VSS_CLONES void widen(const Half* __restrict source, int64_t count, float* __restrict out) {
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(source[i]);
}
VSS_CLONES void widen(const float* __restrict source, int64_t count, float* __restrict out) {
    for (int64_t i = 0; i < count; ++i) out[i] = source[i];
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
        if (p.stride_w == 1 || p.width == 1) {
            for (int64_t c = 0; c < maps; ++c) widen(source + c * p.stride_c, p.width, row(c, y));
            return;
        }
        for (int64_t c = 0; c < maps; ++c)
            for (int64_t x = 0; x < p.width; ++x) row(c, y)[x] = to_float(source[x * p.stride_w + c * p.stride_c]);
    }
};

// A full group of channels_last maps: rows of pixels, straight from memory or widened into the ring's memory.
template <typename T>
void walk_pixels(const MapStatsParams& p, const T* first, float* zeros, float* ring, MapSums<double>* sums) {
    constexpr bool direct = std::is_same_v<T, float>;
    const int64_t step = direct ? p.stride_w : kGroup, size = p.width * kGroup;
    const auto at = [&](int64_t y) -> const float* {
        if constexpr (direct) return first + y * p.stride_h;
        return ring + y % kRing * size;
    };
    const auto fill = [&](int64_t y) {
        if constexpr (!direct)
            for (int64_t x = 0; x < p.width; ++x)
                widen(first + y * p.stride_h + x * p.stride_w, kGroup, ring + y % kRing * size + x * kGroup);
    };
    fill(0);
    for (int64_t y = 0; y < p.height; ++y) {
        if (y + 1 < p.height) fill(y + 1);
        const float* mid = at(y);
        const bool above = y > 0, below = y + 1 < p.height;
        const PixelRow border{p.zero_padding ? zeros : mid, p.zero_padding ? 0 : step};
        add_pixels(above ? PixelRow{at(y - 1), step} : border, {mid, step}, below ? PixelRow{at(y + 1), step} : border,
                   p.width, p.zero_padding, sums);
    }
}

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
    float* scratch = zeros + std::max(p.width, kGroup);
    std::fill(zeros, scratch, 0.0f);
    MapSums<double> sums[kGroup] = {};
    if (p.stride_c == 1 && maps == kGroup && p.height * p.width > 1) {
        walk_pixels(p, first, zeros, scratch + 2 * (p.width + 2), sums);
        for (int64_t c = 0; c < maps; ++c) sums[c].store(p.stats + (n * p.channels + first_channel + c) * kMapStats);
        return;
    }
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
    return std::max(p.width, kGroup) + 2 * (p.width + 2) + kRing * kGroup * p.width;
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
    return by_dtype(p.dtype, [&](auto element) { run<decltype(element)>(p); });
}

}  // namespace vss
