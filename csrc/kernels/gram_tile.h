// How the CUDA gram shares out its work, apart from it so that the host tests run the very same functions.
#pragma once

#include <cmath>

#include "gram.h"

namespace vss {

constexpr int kGramTile = 64;      // channels of a tile's side
constexpr int kGramDepth = 32;     // positions of a step
constexpr int kGramThreads = 128;  // four warps, each a quarter of the tile
constexpr int kGramResident = 2;   // blocks of a multiprocessor at a time
constexpr int kGramBlocks = 132 * kGramResident;
constexpr int kGramFewestSteps = 8;  // of a block
constexpr int kGramTileSize = kGramTile * kGramTile;
constexpr int kGramFetches = kGramTile * kGramDepth / kGramThreads;  // values of a panel that a thread fetches a step

// Positions from one that a thread fetches to its next.
template <bool ByChannel>
constexpr int kGramWalk = ByChannel ? kGramThreads / kGramTile : kGramDepth;

// Floats of a row in shared memory, so that neither writes nor the fragments' reads meet in a bank: rows of channels
// (lanes are positions), or rows of positions (lanes are channels).
constexpr int kGramPitch = 36, kGramPitchByChannel = 72;
constexpr int kGramPanel = kGramTile * kGramPitch;
static_assert(kGramPanel == kGramDepth * kGramPitchByChannel, "both layouts take the same memory");

struct GramPlan {
    bool by_channel;           // lanes are channels (channels_last), or positions
    int64_t panels, pairs;     // of kGramTile channels; pairs are those of the lower triangle
    int64_t positions, width;  // of a map; the width is that of dense rows
    int64_t steps_per_image, steps, splits;
};

VSS_HD GramPlan gram_plan(const GramParams& p) {
    GramPlan plan{};
    plan.by_channel = p.stride_c < p.stride_w;
    plan.panels = ceil_div(p.channels, kGramTile);
    plan.pairs = plan.panels * (plan.panels + 1) / 2;
    plan.positions = p.height * p.width;
    plan.width = dense_width(p.height, p.width, p.stride_h, p.stride_w);
    plan.steps_per_image = ceil_div(plan.positions, kGramDepth);
    plan.steps = p.batch * plan.steps_per_image;
    // As many blocks as are resident, and none that would run after all others; where that leaves many idle, four times
    // as many.
    const int64_t wanted = (plan.pairs * 6 <= kGramBlocks ? kGramBlocks : 4 * kGramBlocks) / plan.pairs,
                  most = ceil_div(plan.steps, kGramFewestSteps);
    plan.splits = wanted < most ? wanted : most;
    plan.splits = plan.splits < 1 ? 1 : plan.splits;
    return plan;
}

// Steps before those of a split; the share of split s ends where that of s + 1 begins.
VSS_HD int64_t gram_first_step(const GramPlan& plan, int64_t split) {
    return plan.steps / plan.splits * split + plan.steps % plan.splits * split / plan.splits;
}

// The tile of this number as row and column of panels of the lower triangle.
struct GramPair {
    int i, j;
};

VSS_HD GramPair gram_pair(int number) {
    int i = static_cast<int>((sqrtf(8.0f * static_cast<float>(number) + 1.0f) - 1.0f) * 0.5f);
    while ((i + 1) * (i + 2) / 2 <= number) ++i;
    while (i * (i + 1) / 2 > number) --i;
    return {i, number - i * (i + 1) / 2};
}

// Which value of a panel a thread fetches as its number `fetch`: channel and position within the panel, and where it
// goes in shared memory. Lanes run along the contiguous axis.
struct GramSlot {
    int channel, position, at;
};

template <bool ByChannel>
VSS_HD GramSlot gram_slot(int thread, int fetch) {
    if (ByChannel) {
        const int channel = thread % kGramTile, position = thread / kGramTile + fetch * kGramWalk<true>;
        return {channel, position, position * kGramPitchByChannel + channel};
    }
    const int position = thread % kGramDepth, channel = thread / kGramDepth + fetch * (kGramThreads / kGramDepth);
    return {channel, position, channel * kGramPitch + position};
}

// Floats before the partial tile of a pair and a split.
VSS_HD int64_t gram_partial(const GramPlan& plan, int64_t split, int64_t pair) {
    return (split * plan.pairs + pair) * kGramTileSize;
}

}  // namespace vss
