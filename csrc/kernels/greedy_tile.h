// What the threads of the CUDA greedy elimination share out and compare, apart from it so that the host tests run the
// very same functions.
#pragma once

#include "greedy.h"

namespace vss {

constexpr int kGreedyThreads = 1024;
constexpr int kGreedyWarps = kGreedyThreads / 32;
constexpr int kGreedyShared = 4096;  // sums in shared memory: 32 KiB
static_assert(kGreedyMaxChannels <= int64_t{kGreedyThreads} * 64, "one bit per channel of a thread");

struct Candidate {
    double sum;
    int index;  // -1: none

    // Larger wins, a NaN above all; between equals the lower index. Independent of the order of comparison.
    VSS_HD void offer(double other_sum, int other_index) {
        if (other_index < 0) return;
        const bool nan = sum != sum, other_nan = other_sum != other_sum;
        const bool equal = nan == other_nan && (nan || sum == other_sum);
        const bool larger = other_nan ? !nan : !nan && other_sum > sum;
        if (index < 0 || larger || (equal && other_index < index)) {
            sum = other_sum;
            index = other_index;
        }
    }
};

// Which of a thread's channels are gone. A thread has channels thread, thread + kGreedyThreads and so on: bit j.
struct Removed {
    uint64_t bits = 0;

    VSS_HD bool has(int64_t channel) const { return bits >> (channel / kGreedyThreads) & 1; }
    VSS_HD void add(int64_t channel) { bits |= uint64_t{1} << (channel / kGreedyThreads); }
};

// The best of a thread's channels that are left.
VSS_HD Candidate best_of_thread(const double* sums, int64_t channels, int thread, const Removed& removed) {
    Candidate best{0.0, -1};
    for (int64_t i = thread; i < channels; i += kGreedyThreads) {
        if (!removed.has(i)) best.offer(sums[i], static_cast<int>(i));
    }
    return best;
}

}  // namespace vss
