// CUDA: one launch for all layers, one block per task. A team of one to eight warps reduces a channel, more the longer
// it is; channels that are short and repeat along the outer axis are read many at a time, and the warps share out the
// outer indices.
#include <cmath>

#include "common.cuh"
#include "weight_reduce_tile.h"

namespace vss {
namespace {

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

// A team per channel; all threads of the block pass the barriers.
template <typename T>
__device__ __forceinline__ void by_team(const ReduceTensor& t, const ReduceTask& task, Reduce mode) {
    __shared__ double warps[kReduceWarps];
    const Elements<T> element(t, mode);
    const int thread = static_cast<int>(threadIdx.x), team = reduce_team(t), teams = kReduceThreads / team;
    const ReduceShare share = reduce_share(t, team, thread % team);
    for (int64_t first = task.first; first < task.last; first += teams) {
        const int64_t c = first + thread / team;
        double sum = 0.0;
        for (int64_t o = share.o; o < t.outer && c < task.last; o += share.outer_step) {
            const int64_t start = reduce_start(t, o, c);
            float part = 0.0f;
#pragma unroll 4
            for (int64_t i = share.i; i < t.inner; i += share.step) part += element(start + i);
            sum += part;
        }
        for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(kAll, sum, step);
        if (team > 32) {
            if (thread % 32 == 0) warps[thread / 32] = sum;
            __syncthreads();
            if (thread % team == 0) {
                for (int w = 1; w < team / 32; ++w) sum += warps[thread / 32 + w];
            }
            __syncthreads();
        }
        if (thread % team == 0 && c < task.last) store(t, mode, c, sum);
    }
}

// A lane per element of the task's channels, a warp every kReduceWarps-th outer index; then a thread per channel.
template <typename T>
__device__ __forceinline__ void by_run(const ReduceTensor& t, const ReduceTask& task, Reduce mode) {
    __shared__ float sums[kReduceWarps][kReduceMostRun];
    const Elements<T> element(t, mode);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const auto inner = static_cast<int>(t.inner);
    const int run = (task.last - task.first) * inner;
    for (int i = lane; i < run; i += 32) {
        float sum = 0.0f;
#pragma unroll 4
        for (int64_t o = warp; o < t.outer; o += kReduceWarps) sum += element(reduce_start(t, o, task.first) + i);
        sums[warp][i] = sum;
    }
    __syncthreads();
    for (int64_t c = task.first + static_cast<int>(threadIdx.x); c < task.last; c += kReduceThreads) {
        double sum = 0.0;
        const auto first = static_cast<int>(c - task.first) * inner;
        for (int w = 0; w < kReduceWarps; ++w)
            for (int i = 0; i < inner; ++i) sum += sums[w][first + i];
        store(t, mode, c, sum);
    }
}

template <typename T>
__global__ void __launch_bounds__(kReduceThreads, 4) reduce(WeightReduceParams p) {
    const ReduceTask task = p.tasks[blockIdx.x];
    const ReduceTensor t = p.tensors[task.tensor];
    if (reduce_short(t)) {
        by_run<T>(t, task, p.mode);
    } else {
        by_team<T>(t, task, p.mode);
    }
}

}  // namespace

Status weight_reduce_cuda(const WeightReduceParams& p, CUstream_st* stream) {
    return visit_dtype(nullptr, p.dtype, [&](auto* typed) {
        using T = std::decay_t<decltype(*typed)>;
        return launch(reduce<T>, p.task_count, kReduceThreads, stream, p);
    });
}

}  // namespace vss
