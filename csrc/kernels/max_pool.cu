// CUDA: a thread per pooled value.
#include "common.cuh"
#include "max_pool_tile.h"

namespace vss {
namespace {

constexpr int64_t kMaxBlocks = 2147483647;

template <typename T>
__global__ void __launch_bounds__(kPoolThreads) pool(MaxPoolParams p, const T* input, int64_t count) {
    const int64_t at = blockIdx.x * int64_t{kPoolThreads} + threadIdx.x;
    if (at >= count) return;
    const PoolPlace place = pool_place(p, at);
    const T* map = input + pool_map_offset(p, place.map);
    const auto source = [&](int64_t y, int64_t x) { return map + y * p.stride[2] + x * p.stride[3]; };
    const int64_t best_at = pool_argmax(p, place, [&](int64_t y, int64_t x) { return load(source(y, x)); });
    static_cast<T*>(p.output)[at] = *source(best_at / p.width, best_at % p.width);
    p.indices[at] = static_cast<int32_t>(best_at);
}

template <typename T>
__global__ void __launch_bounds__(kPoolThreads) unpool(MaxPoolParams p, const T* values, int64_t count) {
    const int64_t at = blockIdx.x * int64_t{kPoolThreads} + threadIdx.x;
    if (at >= count) return;
    const PoolPlace place = pool_place(p, at);
    const int32_t index = p.indices[at];
    if (index < 0 || index >= p.height * p.width) {
        *p.bad_index = 1;
        return;
    }
    static_cast<T*>(p.output)[place.map * p.height * p.width + index] =
        values[pool_map_offset(p, place.map) + place.y * p.stride[2] + place.x * p.stride[3]];
}

template <typename Kernel>
Status run(const MaxPoolParams& p, const Kernel& kernel) {
    const int64_t count = p.batch * p.channels * p.pooled_h * p.pooled_w, blocks = ceil_div(count, kPoolThreads);
    if (blocks > kMaxBlocks) return Status::bad_argument;
    if (blocks == 0) return Status::ok;
    kernel(static_cast<unsigned>(blocks), count);
    return launch_status();
}

}  // namespace

Status max_pool_cuda(const MaxPoolParams& p, CUstream_st* stream) {
    return run(p, [&](unsigned blocks, int64_t count) {
        visit_dtype(p.input, p.dtype, [&](auto* input) { pool<<<blocks, kPoolThreads, 0, stream>>>(p, input, count); });
    });
}

Status max_unpool_cuda(const MaxPoolParams& p, CUstream_st* stream) {
    return run(p, [&](unsigned blocks, int64_t count) {
        visit_dtype(p.input, p.dtype,
                    [&](auto* input) { unpool<<<blocks, kPoolThreads, 0, stream>>>(p, input, count); });
    });
}

}  // namespace vss
