// Per-channel sums over the weights (and gradients) of all layers of a model, in one call.
#pragma once

#include "common.h"

namespace vss {

enum class Reduce : int { l1 = 0, l2 = 1, product = 2, abs_product = 3 };

// One tensor seen as (outer, channels, inner), contiguous: inner is everything after the channel axis.
struct ReduceTensor {
    const void* weight;
    const void* grad;  // null where the mode reads weights alone
    int64_t outer, channels, inner;
    float* sums;  // (channels)
};

// A share of the work: channels first..last of one tensor, all of them.
struct ReduceTask {
    int32_t tensor;
    int32_t first, last;
};

struct WeightReduceParams {
    const ReduceTensor* tensors;  // host memory for the CPU kernel, device memory for the CUDA kernel
    const ReduceTask* tasks;      // likewise
    int64_t task_count;
    DType dtype;
    Reduce mode;
    int threads;  // CPU only: at least 1
};

constexpr int64_t kReduceChunk = 4096;

// Channels that one task of the CPU kernel takes, so that a run of its elements is at most kReduceChunk long where
// channels repeat along `outer`. The CUDA kernel's tasks are those of reduce_channels_cuda (weight_reduce_tile.h).
inline int64_t reduce_channels_per_task(const ReduceTensor& t) {
    const int64_t inner = t.inner > 0 ? t.inner : 1;
    const int64_t fit = t.outer == 1 ? ceil_div(16 * kReduceChunk, inner) : kReduceChunk / inner;
    return fit < 1 ? 1 : (fit < t.channels ? fit : t.channels);
}

// l1: sum |w|; l2: sqrt(sum w^2); product: sum w*g; abs_product: sum |w*g|.
Status weight_reduce_cpu(const WeightReduceParams& p);
Status weight_reduce_cuda(const WeightReduceParams& p, CUstream_st* stream);

}  // namespace vss
