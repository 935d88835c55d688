// Index arithmetic and window of the CUDA map_stats, apart from it so that the host tests run the very same functions.
#pragma once

#include <cmath>

#include "map_stats.h"

namespace vss {

constexpr int kStatsThreads = 256;
constexpr int kStatsWarps = kStatsThreads / 32;

// Whether lanes run along channels (channels_last) or along columns.
VSS_HD bool stats_by_channel(const MapStatsParams& p) {
    return p.stride_c < p.stride_w && p.channels >= 16;
}

// Threads along a row of a block that makes one map: a power of two, 32 at least.
VSS_HD int stats_columns(int64_t width) {
    int columns = 32;
    while (columns < width && columns < kStatsThreads) columns *= 2;
    return columns;
}

// Rows first..last (none where last <= first) and the first column of a thread; its columns are `columns` apart.
struct StatsBand {
    int64_t first, last, column;
};

VSS_HD StatsBand stats_band(int thread, int columns, int64_t height) {
    const int64_t rows = ceil_div(height, kStatsThreads / columns), first = thread / columns * rows;
    return {first, first + rows < height ? first + rows : height, thread % columns};
}

// Offset of element (y, x) of a map seen through its padding; -1: a zero of the padding.
VSS_HD int64_t padded_offset(const MapStatsParams& p, int64_t y, int64_t x) {
    const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
    if (!inside && p.zero_padding) return -1;
    y = y < 0 ? 0 : (y < p.height ? y : p.height - 1);
    x = x < 0 ? 0 : (x < p.width ? x : p.width - 1);
    return y * p.stride_h + x * p.stride_w;
}

struct WindowRow {
    float left, mid, right;
};

VSS_CALLS_EITHER
template <typename Map>
VSS_HD WindowRow window_row(const Map& map, int64_t y, int64_t x) {
    return {map(y, x - 1), map(y, x), map(y, x + 1)};
}

VSS_HD void add_window(MapSums<float>& sums, const WindowRow& up, const WindowRow& mid, const WindowRow& down) {
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

// Column x from row `first` to before row `last`; map(y, x) reads through the padding.
VSS_CALLS_EITHER
template <typename Map>
VSS_HD void walk_down(const Map& map, int64_t x, int64_t first, int64_t last, MapSums<float>& sums) {
    WindowRow up = window_row(map, first - 1, x), mid = window_row(map, first, x);
    for (int64_t y = first; y < last; ++y) {
        const WindowRow down = window_row(map, y + 1, x);
        add_window(sums, up, mid, down);
        up = mid;
        mid = down;
    }
}

}  // namespace vss
