// Index arithmetic of CUDA max pooling, apart from it so that the host tests run the very same functions.
#pragma once

#include "max_pool.h"

namespace vss {

constexpr int kPoolThreads = 256;

// Which pooled value a thread makes.
struct PoolPlace {
    int64_t map, y, x;
};

VSS_HD PoolPlace pool_place(const MaxPoolParams& p, int64_t at) {
    return {at / (p.pooled_h * p.pooled_w), at / p.pooled_w % p.pooled_h, at % p.pooled_w};
}

// Offset of a map of the strided input.
VSS_HD int64_t pool_map_offset(const MaxPoolParams& p, int64_t map) {
    return map / p.channels * p.stride[0] + map % p.channels * p.stride[1];
}

// Position within its map of the first maximum of a window; value(y, x) reads the map. A NaN is the largest.
VSS_CALLS_EITHER
template <typename Value>
VSS_HD int64_t pool_argmax(const MaxPoolParams& p, const PoolPlace& place, const Value& value) {
    int64_t best_at = place.y * p.kernel * p.width + place.x * p.kernel;
    float best = value(place.y * p.kernel, place.x * p.kernel);
    for (int64_t y = place.y * p.kernel; y < (place.y + 1) * p.kernel; ++y) {
        for (int64_t x = place.x * p.kernel; x < (place.x + 1) * p.kernel; ++x) {
            const float candidate = value(y, x);
            if (candidate <= best || best != best) continue;
            best = candidate;
            best_at = y * p.width + x;
        }
    }
    return best_at;
}

}  // namespace vss
