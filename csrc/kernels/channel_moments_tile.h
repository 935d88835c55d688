// How the CUDA channel_moments shares out its work, apart from it so that the host tests run the very same functions.
#pragma once

#include "channel_moments.h"

namespace vss {

constexpr int kMomentThreads = 256;
constexpr int kMomentWarps = kMomentThreads / 32;
constexpr int kMomentBlocks = 1056;      // blocks to aim for: eight for each of 132 multiprocessors
constexpr int kMomentMostFloats = 512;   // positions that a thread adds up in float
constexpr int kMomentFewestFloats = 16;  // positions of a thread for which another block is worth it

struct MomentPlan {
    bool by_channel;           // lanes are channels (channels_last), or positions
    int64_t groups;            // maps, or groups of 32 channels of an image
    int64_t positions, width;  // of a map; the width is that of dense rows
    int64_t step;              // positions from one of a thread to its next
    int64_t splits, share;     // blocks that share out the positions of a group, and how many each takes
};

VSS_HD MomentPlan moment_plan(const ChannelMomentsParams& p) {
    MomentPlan plan{};
    plan.by_channel = p.stride_a[1] < p.stride_a[3] && p.channels >= 16;
    plan.groups = p.batch * (plan.by_channel ? ceil_div(p.channels, 32) : p.channels);
    plan.positions = p.height * p.width;
    const int64_t dense = dense_width(p.height, p.width, p.stride_a[2], p.stride_a[3]);
    plan.width = dense == dense_width(p.height, p.width, p.stride_g[2], p.stride_g[3]) ? dense : p.width;
    plan.step = plan.by_channel ? kMomentWarps : kMomentThreads;
    const int64_t wanted = plan.groups > 0 ? ceil_div(kMomentBlocks, plan.groups) : 1,
                  most = ceil_div(plan.positions, plan.step * kMomentFewestFloats),
                  least = ceil_div(plan.positions, plan.step * kMomentMostFloats);
    plan.splits = wanted < most ? wanted : most;
    plan.splits = plan.splits < least ? least : plan.splits;
    plan.splits = plan.splits < 1 ? 1 : plan.splits;
    plan.share = ceil_div(plan.positions, plan.splits);
    return plan;
}

// The positions of one thread of a split: `first`, and so many of them, `step` apart.
struct MomentShare {
    int64_t first;
    int32_t count;
};

// `thread` is 0..step - 1.
VSS_HD MomentShare moment_share(const MomentPlan& plan, int64_t split, int thread) {
    const int64_t first = split * plan.share + thread, end = (split + 1) * plan.share;
    const int64_t last = end < plan.positions ? end : plan.positions;
    return {first, first < last ? static_cast<int32_t>(ceil_div(last - first, plan.step)) : 0};
}

}  // namespace vss
