// CUDA: a thread per pooled value.
#include "common.cuh"
#include "max_pool.h"

namespace vss {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 2147483647;

// Which pooled value a thread makes.
struct Place {
    int64_t map, y, x;

    __device__ __forceinline__ Place(const MaxPoolParams& p, int64_t at)
        : map(at / (p.pooled_h * p.pooled_w)), y(at / p.pooled_w % p.pooled_h), x(at % p.pooled_w) {}

    __device__ __forceinline__ int64_t map_offset(const MaxPoolParams& p) const {
        return map / p.channels * p.stride[0] + map % p.channels * p.stride[1];
    }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) pool(MaxPoolParams p, const T* input, int64_t count) {
    const int64_t at = blockIdx.x * int64_t{kThreads} + threadIdx.x;
    if (at >= count) return;
    const Place place(p, at);
    const T* map = input + place.map_offset(p);
    int64_t best_at = 0;
    T best{};
    float leader = 0.0f;
    bool any = false;
    for (int64_t y = place.y * p.kernel; y < (place.y + 1) * p.kernel; ++y) {
        for (int64_t x = place.x * p.kernel; x < (place.x + 1) * p.kernel; ++x) {
            const T* source = map + y * p.stride[2] + x * p.stride[3];
            const float candidate = load(source);
            if (any && (candidate <= leader || leader != leader)) continue;
            any = true;
            leader = candidate;
            best = *source;
            best_at = y * p.width + x;
        }
    }
    static_cast<T*>(p.output)[at] = best;
    p.indices[at] = static_cast<int32_t>(best_at);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) unpool(MaxPoolParams p, const T* values, int64_t count) {
    const int64_t at = blockIdx.x * int64_t{kThreads} + threadIdx.x;
    if (at >= count) return;
    const Place place(p, at);
    const int32_t index = p.indices[at];
    if (index < 0 || index >= p.height * p.width) {
        *p.bad_index = 1;
        return;
    }
    static_cast<T*>(p.output)[place.map * p.height * p.width + index] =
        values[place.map_offset(p) + place.y * p.stride[2] + place.x * p.stride[3]];
}

template <typename Kernel>
Status run(const MaxPoolParams& p, const Kernel& kernel) {
    const int64_t count = p.batch * p.channels * p.pooled_h * p.pooled_w, blocks = ceil_div(count, kThreads);
    if (blocks > kMaxBlocks) return Status::bad_argument;
    if (blocks == 0) return Status::ok;
    kernel(static_cast<unsigned>(blocks), count);
    return launch_status();
}

}  // namespace

Status max_pool_cuda(const MaxPoolParams& p, CUstream_st* stream) {
    return run(p, [&](unsigned blocks, int64_t count) {
        visit_dtype(p.input, p.dtype, [&](auto* input) { pool<<<blocks, kThreads, 0, stream>>>(p, input, count); });
    });
}

Status max_unpool_cuda(const MaxPoolParams& p, CUstream_st* stream) {
    return run(p, [&](unsigned blocks, int64_t count) {
        visit_dtype(p.input, p.dtype, [&](auto* input) { unpool<<<blocks, kThreads, 0, stream>>>(p, input, count); });
    });
}

}  // namespace vss
