// Index arithmetic of CUDA max pooling, apart from it so that the host tests run the very same functions.
#pragma once

#include "max_pool.h"

namespace vss {

constexpr int kPoolThreads = 256;

// The pooled values of one launch, those of maps first_map and on: fewer than 2^31, so that 32-bit numbers count them.
struct PoolLaunch {
    int64_t first_map;
    uint32_t values;
    FastDiv per_map, per_row, channels;

    PoolLaunch(const MaxPoolParams& p, int64_t map, int64_t maps)
        : first_map(map),
          values(static_cast<uint32_t>(maps * p.pooled_h * p.pooled_w)),
          per_map(p.pooled_h * p.pooled_w),
          per_row(p.pooled_w),
          channels(p.channels) {}
};

// Maps that fit into one launch.
inline int64_t pool_maps(const MaxPoolParams& p) {
    const int64_t fit = (kMaxBlocks - kPoolThreads) / (p.pooled_h * p.pooled_w);
    return fit < 1 ? 1 : fit;
}

// Which pooled value a thread makes: number `map` of all maps, image n, channel c, row y and column x.
struct PoolPlace {
    int64_t map;
    int32_t n, c, y, x;
};

VSS_HD PoolPlace pool_place(const PoolLaunch& launch, uint32_t at) {
    const uint32_t local = launch.per_map.quotient(at), rest = at - local * launch.per_map.divisor;
    const uint32_t y = launch.per_row.quotient(rest), x = rest - y * launch.per_row.divisor;
    const auto map = static_cast<uint32_t>(launch.first_map + local);
    const uint32_t n = launch.channels.quotient(map), c = map - n * launch.channels.divisor;
    return {launch.first_map + local, static_cast<int32_t>(n), static_cast<int32_t>(c), static_cast<int32_t>(y),
            static_cast<int32_t>(x)};
}

// Offset of element (y, x) of the place's map of the strided input.
VSS_HD int64_t pool_offset(const MaxPoolParams& p, const PoolPlace& place, int64_t y, int64_t x) {
    return place.n * p.stride[0] + place.c * p.stride[1] + y * p.stride[2] + x * p.stride[3];
}

}  // namespace vss
