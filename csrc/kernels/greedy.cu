// CUDA: one block per matrix, so that all layers of a net go in one launch. Sums stay in shared memory while they fit,
// else in the `value` output, which ends up holding them anyway; which channels are left is a bit mask in registers.
#include "common.cuh"
#include "greedy_tile.h"

namespace vss {
namespace {

__device__ __forceinline__ void reduce_warp(Candidate& best) {
    for (int step = 16; step > 0; step /= 2) {
        const double other_sum = __shfl_down_sync(0xffffffffu, best.sum, step);
        const int other_index = __shfl_down_sync(0xffffffffu, best.index, step);
        best.offer(other_sum, other_index);
    }
}

__device__ __forceinline__ void row_sums(const GreedyMatrix& m, double* sums) {
    const int lane = threadIdx.x % 32;
    for (int64_t i = threadIdx.x / 32; i < m.channels; i += kGreedyWarps) {
        double sum = 0.0;
        for (int64_t j = lane; j < m.channels; j += 32)
            sum += static_cast<double>(load(m.similarity + i * m.stride_row + j));
        for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
        if (lane == 0) sums[i] = sum;
    }
}

__global__ void __launch_bounds__(kGreedyThreads) eliminate(const GreedyMatrix* matrices) {
    __shared__ double shared_sums[kGreedyShared];
    __shared__ Candidate leaders[kGreedyWarps];
    const GreedyMatrix m = matrices[blockIdx.x];
    double* sums = m.channels <= kGreedyShared ? shared_sums : m.value;
    row_sums(m, sums);
    __syncthreads();
    Removed removed;
    for (int64_t step = 0; step < m.channels; ++step) {
        Candidate best = best_of_thread(sums, m.channels, static_cast<int>(threadIdx.x), removed);
        reduce_warp(best);
        if (threadIdx.x % 32 == 0) leaders[threadIdx.x / 32] = best;
        __syncthreads();
        best = leaders[threadIdx.x % 32];
        reduce_warp(best);
        const int k = __shfl_sync(0xffffffffu, best.index, 0);
        if (threadIdx.x == k % kGreedyThreads) removed.add(k);
        if (threadIdx.x == 0) {
            m.order[step] = k;
            m.value[k] = best.sum;
        }
        const float* row = m.similarity + k * m.stride_row;
        for (int64_t i = threadIdx.x; i < m.channels; i += kGreedyThreads) {
            if (!removed.has(i)) sums[i] -= static_cast<double>(load(row + i));
        }
        __syncthreads();
    }
}

}  // namespace

Status greedy_cuda(const GreedyParams& p, CUstream_st* stream) {
    if (p.count == 0) return Status::ok;
    eliminate<<<static_cast<unsigned>(p.count), kGreedyThreads, 0, stream>>>(p.matrices);
    return launch_status();
}

}  // namespace vss
