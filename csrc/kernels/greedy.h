// Greedy redundancy elimination over symmetric similarity matrices: repeatedly remove the channel with the largest sum
// of similarities to the channels that are left. O(C^2) per matrix by updating the sums instead of forming them again.
#pragma once

#include "common.h"

namespace vss {

struct GreedyMatrix {
    const float* similarity;  // (channels, channels), rows contiguous, read as symmetric
    int64_t channels, stride_row;
    int64_t* order;  // (channels): order[t] is removed at step t
    double* value;   // (channels): value[c] is the sum of channel c when it was removed
};

struct GreedyParams {
    const GreedyMatrix* matrices;
    int64_t count;
    int threads;        // at least 1; matrices are shared out among threads
    double* workspace;  // greedy_workspace() doubles
};

int64_t greedy_workspace(const GreedyParams& p);

constexpr int64_t kGreedyMaxChannels = 65536;

// Sums are double. Ties go to the lowest index; a NaN counts as the largest value, as in torch.argmax.
Status greedy_cpu(const GreedyParams& p);

}  // namespace vss
