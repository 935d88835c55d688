// CUDA: one launch for all layers, one block per task. Threads stride over the task's elements of every outer index in
// memory order and add into per-channel sums: a block takes one channel (reduced in registers) or, where channels are
// short and repeat along the outer axis, one thread per element of the run.
#include "common.cuh"
#include "weight_reduce_tile.h"

namespace vss {
namespace {

constexpr int64_t kMaxBlocks = 2147483647;

__device__ __forceinline__ float term(Reduce mode, float weight, float grad) {
    switch (mode) {
        case Reduce::l1:
            return fabsf(weight);
        case Reduce::l2:
            return weight * weight;
        case Reduce::product:
            return weight * grad;
        default:
            return fabsf(weight * grad);
    }
}

template <typename T>
struct Elements {
    const T* weight;
    const T* grad;
    Reduce mode;

    __device__ __forceinline__ explicit Elements(const ReduceTensor& t, Reduce m)
        : weight(static_cast<const T*>(t.weight)), grad(static_cast<const T*>(t.grad)), mode(m) {}

    __device__ __forceinline__ float operator()(int64_t at) const {
        return term(mode, load(weight + at), grad ? load(grad + at) : 0.0f);
    }
};

__device__ __forceinline__ void store(const ReduceTensor& t, Reduce mode, int64_t channel, double sum) {
    t.sums[channel] = static_cast<float>(mode == Reduce::l2 ? sqrt(sum) : sum);
}

// A warp per channel; its lanes run along `inner`.
template <typename T>
__device__ __forceinline__ void by_channel(const ReduceTensor& t, const ReduceTask& task, Reduce mode) {
    const Elements<T> element(t, mode);
    const int lane = threadIdx.x % 32;
    for (int64_t c = task.first + threadIdx.x / 32; c < task.last; c += kReduceWarps) {
        double sum = 0.0;
        for (int64_t o = 0; o < t.outer; ++o) {
            float part = 0.0f;
            const int64_t start = reduce_start(t, o, c);
            for (int64_t i = lane; i < t.inner; i += 32) part += element(start + i);
            sum += part;
        }
        for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
        if (lane == 0) store(t, mode, c, sum);
    }
}

// A thread per element of the run, over all outer indices; then a thread per channel sums its elements.
template <typename T>
__device__ __forceinline__ void by_element(const ReduceTensor& t, const ReduceTask& task, Reduce mode, float* sums) {
    const Elements<T> element(t, mode);
    const int64_t count = reduce_run(t, task);
    for (int64_t i = threadIdx.x; i < count; i += kReduceThreads) {
        float sum = 0.0f;
        for (int64_t o = 0; o < t.outer; ++o) sum += element(reduce_start(t, o, task.first) + i);
        sums[i] = sum;
    }
    __syncthreads();
    for (int64_t c = task.first + threadIdx.x; c < task.last; c += kReduceThreads) {
        double sum = 0.0;
        for (int64_t i = 0; i < t.inner; ++i) sum += sums[(c - task.first) * t.inner + i];
        store(t, mode, c, sum);
    }
}

template <typename T>
__global__ void __launch_bounds__(kReduceThreads) reduce(WeightReduceParams p) {
    __shared__ float sums[kReduceChunk];
    const ReduceTask task = p.tasks[blockIdx.x];
    const ReduceTensor t = p.tensors[task.tensor];
    if (reduce_by_element(t, task)) {
        by_element<T>(t, task, p.mode, sums);
    } else {
        by_channel<T>(t, task, p.mode);
    }
}

}  // namespace

Status weight_reduce_cuda(const WeightReduceParams& p, CUstream_st* stream) {
    if (p.task_count > kMaxBlocks) return Status::bad_argument;
    if (p.task_count == 0) return Status::ok;
    visit_dtype(nullptr, p.dtype, [&](auto* typed) {
        using T = std::decay_t<decltype(*typed)>;
        reduce<T><<<static_cast<unsigned>(p.task_count), kReduceThreads, 0, stream>>>(p);
    });
    return launch_status();
}

}  // namespace vss
