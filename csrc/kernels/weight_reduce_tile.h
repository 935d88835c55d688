// How the CUDA weight reduction shares out its work, apart from it so that the host tests run the very same functions.
#pragma once

#include "weight_reduce.h"

namespace vss {

constexpr int kReduceThreads = 256;
constexpr int kReduceWarps = kReduceThreads / 32;
constexpr int kReduceMostRun = 64;    // elements of a run of short channels
constexpr int kReducePerThread = 96;  // elements of a thread from which another warp helps with a channel
constexpr int kReducePerTask = 8192;  // elements of a block from which its channels go to several

// Channels that repeat along the outer axis and are shorter than a warp: lanes run over the elements of several
// channels, warps share out the outer indices. Else a team of warps takes one channel.
VSS_HD bool reduce_short(const ReduceTensor& t) {
    return t.outer > 1 && t.inner < 32;
}

// Threads that reduce one channel together: 32, 64, 128 or 256.
VSS_HD int reduce_team(const ReduceTensor& t) {
    const int64_t elements = t.outer * t.inner;
    int team = 32;
    while (team < kReduceThreads && elements > int64_t{team} * kReducePerThread) team *= 2;
    return team;
}

// Channels that one block takes.
VSS_HD int64_t reduce_channels_cuda(const ReduceTensor& t) {
    if (reduce_short(t)) return t.inner > 0 ? kReduceMostRun / t.inner : t.channels;
    const int64_t teams = kReduceThreads / reduce_team(t), elements = t.outer * t.inner * teams;
    const int64_t rounds = elements > 0 ? kReducePerTask / elements : 1;
    return teams * (rounds > 1 ? rounds : 1);
}

// Elements of a channel that a thread of its team reads: those of outer index `o` from `i` on, `step` apart, then of
// the outer index `outer_step` on. A channel without an outer axis is shared out as one run.
struct ReduceShare {
    int64_t o, outer_step, i, step;
};

VSS_HD ReduceShare reduce_share(const ReduceTensor& t, int team, int thread) {
    if (t.outer == 1) return {0, 1, thread, team};
    return {thread / 32, team / 32, thread % 32, 32};
}

// Offset of element 0 of channel c at outer index o.
VSS_HD int64_t reduce_start(const ReduceTensor& t, int64_t o, int64_t c) {
    return (o * t.channels + c) * t.inner;
}

}  // namespace vss
