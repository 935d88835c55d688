// Index arithmetic of the CUDA gram, apart from it so that the host tests run the very same functions.
#pragma once

#include <cmath>

#include "gram.h"

namespace vss {

constexpr int kGramTile = 64;      // channels of a tile's side
constexpr int kGramDepth = 32;     // positions of a step
constexpr int kGramPitch = 36;     // floats of a row in shared memory
constexpr int kGramThreads = 128;  // four warps, each a quarter of the tile
constexpr int kGramBlocks = 528;   // blocks to aim for: four for each of 132 multiprocessors
constexpr int kGramTileSize = kGramTile * kGramTile;

struct GramPlan {
    int64_t panels, pairs, steps_per_image, steps, splits;
};

VSS_HD GramPlan gram_plan(const GramParams& p) {
    GramPlan plan{};
    plan.panels = ceil_div(p.channels, kGramTile);
    plan.pairs = plan.panels * (plan.panels + 1) / 2;
    plan.steps_per_image = ceil_div(p.height * p.width, kGramDepth);
    plan.steps = p.batch * plan.steps_per_image;
    const int64_t wanted = ceil_div(kGramBlocks, plan.pairs), most = ceil_div(plan.steps, 8);
    plan.splits = wanted < most ? wanted : most;
    plan.splits = plan.splits < 1 ? 1 : plan.splits;
    return plan;
}

// Steps before that of a split's share; the share of split s ends where that of s + 1 begins.
VSS_HD int64_t gram_first_step(const GramPlan& plan, int64_t split) {
    return plan.steps * split / plan.splits;
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

// Which element of a step's panel a thread fetches: `slot` in shared memory, `offset` in the maps (-1: outside, 0).
struct GramElement {
    int slot;
    int64_t channel, offset;
};

// at = 0..kGramTile * kGramDepth - 1; lanes run along the contiguous axis.
VSS_HD GramElement gram_element(const GramParams& p, int64_t n, int64_t first, int panel, int at) {
    const bool by_channel = p.stride_c < p.stride_w;
    const int c = by_channel ? at % kGramTile : at / kGramDepth, k = by_channel ? at / kGramTile : at % kGramDepth;
    const int64_t channel = panel * int64_t{kGramTile} + c, position = first + k;
    GramElement element{c * kGramPitch + k, channel, -1};
    if (channel < p.channels && position < p.height * p.width) {
        const int64_t y = position / p.width, x = position % p.width;
        element.offset = n * p.stride_n + channel * p.stride_c + y * p.stride_h + x * p.stride_w;
    }
    return element;
}

// Floats before the partial tile of a pair and a split.
VSS_HD int64_t gram_partial(const GramPlan& plan, int64_t split, int64_t pair) {
    return (split * plan.pairs + pair) * kGramTileSize;
}

}  // namespace vss
