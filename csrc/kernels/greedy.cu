// CUDA: one block per matrix, so that all layers of a net go in one launch. Sums stay in shared memory while they fit,
// else in the `value` output, which ends up holding them anyway; which channels are left is a bit mask in registers.
#include "common.cuh"
#include "greedy.h"

namespace vss {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kShared = 4096;  // sums in shared memory: 32 KiB
static_assert(kGreedyMaxChannels <= int64_t{kThreads} * 64, "one bit per channel of a thread");

struct Candidate {
    double sum;
    int index;  // -1: none

    // Larger wins, a NaN above all; between equals the lower index. Independent of the order of comparison.
    __device__ __forceinline__ void offer(double other_sum, int other_index) {
        if (other_index < 0) return;
        const bool nan = sum != sum, other_nan = other_sum != other_sum;
        const bool equal = nan == other_nan && (nan || sum == other_sum);
        const bool larger = other_nan ? !nan : !nan && other_sum > sum;
        if (index < 0 || larger || (equal && other_index < index)) {
            sum = other_sum;
            index = other_index;
        }
    }

    __device__ __forceinline__ void reduce_warp() {
        for (int step = 16; step > 0; step /= 2) {
            const double other_sum = __shfl_down_sync(0xffffffffu, sum, step);
            const int other_index = __shfl_down_sync(0xffffffffu, index, step);
            offer(other_sum, other_index);
        }
    }
};

__device__ __forceinline__ void row_sums(const GreedyMatrix& m, double* sums) {
    const int lane = threadIdx.x % 32;
    for (int64_t i = threadIdx.x / 32; i < m.channels; i += kWarps) {
        double sum = 0.0;
        for (int64_t j = lane; j < m.channels; j += 32)
            sum += static_cast<double>(load(m.similarity + i * m.stride_row + j));
        for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
        if (lane == 0) sums[i] = sum;
    }
}

__global__ void __launch_bounds__(kThreads) eliminate(const GreedyMatrix* matrices) {
    __shared__ double shared_sums[kShared];
    __shared__ Candidate leaders[kWarps];
    const GreedyMatrix m = matrices[blockIdx.x];
    double* sums = m.channels <= kShared ? shared_sums : m.value;
    row_sums(m, sums);
    __syncthreads();
    uint64_t removed = 0;  // bit j: channel threadIdx.x + j * kThreads
    for (int64_t step = 0; step < m.channels; ++step) {
        Candidate best{0.0, -1};
        int slot = 0;
        for (int64_t i = threadIdx.x; i < m.channels; i += kThreads, ++slot) {
            if (!(removed >> slot & 1)) best.offer(sums[i], static_cast<int>(i));
        }
        best.reduce_warp();
        if (threadIdx.x % 32 == 0) leaders[threadIdx.x / 32] = best;
        __syncthreads();
        best = leaders[threadIdx.x % 32];
        best.reduce_warp();
        const int k = __shfl_sync(0xffffffffu, best.index, 0);
        if (threadIdx.x == k % kThreads) removed |= uint64_t{1} << (k / kThreads);
        if (threadIdx.x == 0) {
            m.order[step] = k;
            m.value[k] = best.sum;
        }
        const float* row = m.similarity + k * m.stride_row;
        slot = 0;
        for (int64_t i = threadIdx.x; i < m.channels; i += kThreads, ++slot) {
            if (!(removed >> slot & 1)) sums[i] -= static_cast<double>(load(row + i));
        }
        __syncthreads();
    }
}

}  // namespace

Status greedy_cuda(const GreedyParams& p, CUstream_st* stream) {
    if (p.count == 0) return Status::ok;
    eliminate<<<static_cast<unsigned>(p.count), kThreads, 0, stream>>>(p.matrices);
    return launch_status();
}

}  // namespace vss
