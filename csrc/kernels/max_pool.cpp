// CPU: threads over maps. Values are moved as they are; only comparisons look at them as floats.
#include "max_pool.h"

namespace vss {
namespace {

template <typename T>
void pool_map(const MaxPoolParams& p, int64_t map) {
    const T* input = static_cast<const T*>(p.input) + map / p.channels * p.stride[0] + map % p.channels * p.stride[1];
    T* output = static_cast<T*>(p.output) + map * p.pooled_h * p.pooled_w;
    int32_t* indices = p.indices + map * p.pooled_h * p.pooled_w;
    for (int64_t py = 0; py < p.pooled_h; ++py) {
        for (int64_t px = 0; px < p.pooled_w; ++px, ++output, ++indices) {
            int64_t best_y = py * p.kernel, best_x = px * p.kernel;
            T best = input[best_y * p.stride[2] + best_x * p.stride[3]];
            for (int64_t y = py * p.kernel; y < (py + 1) * p.kernel; ++y) {
                for (int64_t x = px * p.kernel; x < (px + 1) * p.kernel; ++x) {
                    const T value = input[y * p.stride[2] + x * p.stride[3]];
                    const float candidate = to_float(value), leader = to_float(best);
                    const bool wins = !(candidate <= leader) && leader == leader;
                    best = wins ? value : best;
                    best_y = wins ? y : best_y;
                    best_x = wins ? x : best_x;
                }
            }
            *output = best;
            *indices = static_cast<int32_t>(best_y * p.width + best_x);
        }
    }
}

template <typename T>
void unpool_map(const MaxPoolParams& p, int64_t map) {
    const T* values = static_cast<const T*>(p.input) + map / p.channels * p.stride[0] + map % p.channels * p.stride[1];
    T* output = static_cast<T*>(p.output) + map * p.height * p.width;
    const int32_t* indices = p.indices + map * p.pooled_h * p.pooled_w;
    for (int64_t y = 0; y < p.pooled_h; ++y) {
        for (int64_t x = 0; x < p.pooled_w; ++x, ++indices) {
            const bool inside = *indices >= 0 && *indices < p.height * p.width;
            if (inside) output[*indices] = values[y * p.stride[2] + x * p.stride[3]];
        }
    }
}

template <typename T>
void pool(const MaxPoolParams& p) {
#pragma omp parallel for num_threads(p.threads) if (p.threads > 1)
    for (int64_t map = 0; map < p.batch * p.channels; ++map) pool_map<T>(p, map);
}

template <typename T>
void unpool(const MaxPoolParams& p) {
#pragma omp parallel for num_threads(p.threads) if (p.threads > 1)
    for (int64_t map = 0; map < p.batch * p.channels; ++map) unpool_map<T>(p, map);
}

}  // namespace

Status max_pool_cpu(const MaxPoolParams& p) {
    if (p.threads < 1 || p.kernel < 1) return Status::bad_argument;
    return by_dtype(p.dtype, [&](auto element) { pool<decltype(element)>(p); });
}

Status max_unpool_cpu(const MaxPoolParams& p) {
    if (p.threads < 1) return Status::bad_argument;
    return by_dtype(p.dtype, [&](auto element) { unpool<decltype(element)>(p); });
}

}  // namespace vss
