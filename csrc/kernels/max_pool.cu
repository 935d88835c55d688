// CUDA: a thread per pooled value; where it belongs is found by multiplications (FastDiv). A tensor of 2^31 pooled
// values or more takes several launches.
#include <algorithm>

#include "common.cuh"
#include "max_pool_tile.h"

namespace vss {
namespace {

template <typename T>
__global__ void __launch_bounds__(kPoolThreads) pool(MaxPoolParams p, const T* input, PoolLaunch part) {
    const uint32_t at = blockIdx.x * kPoolThreads + threadIdx.x;
    if (at >= part.values) return;
    const PoolPlace place = pool_place(part, at);
    const auto kernel = static_cast<int32_t>(p.kernel);
    const int32_t first_y = place.y * kernel, first_x = place.x * kernel;
    const T* row = input + pool_offset(p, place, first_y, first_x);
    const T* best_at = row;
    float best = load(row);
    int32_t best_y = first_y, best_x = first_x;
    for (int32_t y = 0; y < kernel; ++y, row += p.stride[2]) {
        const T* value_at = row;
        for (int32_t x = 0; x < kernel; ++x, value_at += p.stride[3]) {
            const float value = load(value_at);
            if (value <= best || best != best) continue;  // the first maximum stays, and a NaN is the largest
            best = value, best_at = value_at;
            best_y = first_y + y, best_x = first_x + x;
        }
    }
    const int64_t out = place.map * p.pooled_h * p.pooled_w + place.y * p.pooled_w + place.x;
    static_cast<T*>(p.output)[out] = *best_at;
    p.indices[out] = best_y * static_cast<int32_t>(p.width) + best_x;
}

template <typename T>
__global__ void __launch_bounds__(kPoolThreads) unpool(MaxPoolParams p, const T* values, PoolLaunch part) {
    const uint32_t at = blockIdx.x * kPoolThreads + threadIdx.x;
    if (at >= part.values) return;
    const PoolPlace place = pool_place(part, at);
    const int32_t index = p.indices[place.map * p.pooled_h * p.pooled_w + place.y * p.pooled_w + place.x];
    if (index < 0 || index >= p.height * p.width) return;
    static_cast<T*>(p.output)[place.map * p.height * p.width + index] = values[pool_offset(p, place, place.y, place.x)];
}

// Calls run(part, blocks) until all maps are done.
template <typename Run>
Status launch_parts(const MaxPoolParams& p, const Run& run) {
    const int64_t maps = p.batch * p.channels, at_once = pool_maps(p);
    if (maps > kMaxBlocks || p.pooled_h * p.pooled_w > kMaxBlocks - kPoolThreads) return Status::bad_argument;
    for (int64_t map = 0; map < maps; map += at_once) {
        const PoolLaunch part(p, map, std::min(at_once, maps - map));
        const Status status = run(part, ceil_div(part.values, kPoolThreads));
        if (status != Status::ok) return status;
    }
    return Status::ok;
}

}  // namespace

Status max_pool_cuda(const MaxPoolParams& p, CUstream_st* stream) {
    if (p.batch * p.channels * p.pooled_h * p.pooled_w == 0) return Status::ok;
    return visit_dtype(p.input, p.dtype, [&](auto* input) {
        return launch_parts(p, [&](const PoolLaunch& part, int64_t blocks) {
            return launch(pool<std::decay_t<decltype(*input)>>, blocks, kPoolThreads, stream, p, input, part);
        });
    });
}

Status max_unpool_cuda(const MaxPoolParams& p, CUstream_st* stream) {
    if (p.batch * p.channels * p.pooled_h * p.pooled_w == 0) return Status::ok;
    return visit_dtype(p.input, p.dtype, [&](auto* input) {
        return launch_parts(p, [&](const PoolLaunch& part, int64_t blocks) {
            return launch(unpool<std::decay_t<decltype(*input)>>, blocks, kPoolThreads, stream, p, input, part);
        });
    });
}

}  // namespace vss
