// Index arithmetic of the CUDA seg_argmax, apart from it so that the host tests run the very same functions.
#pragma once

#include "resize.h"
#include "seg_argmax.h"

namespace vss {

constexpr int kPixels = 4;     // adjacent pixels of a thread
constexpr int kSegment = 512;  // output columns of a block
constexpr int kBand = 4;       // output rows of a block
constexpr int kStage = 4096;   // floats of shared memory: 16 KiB

// What all blocks of a launch have in common.
struct SegPlan {
    float scale_h, scale_w;
    int64_t segments, bands;  // of a row, and of an image
    bool staged;              // two rows of the input columns of a segment fit into shared memory
    bool vectors;             // the labels of a thread's pixels may be written at once
};

// An odd pitch spreads the classes of one column over the banks of shared memory.
VSS_HD int stage_pitch(int width) {
    return width | 1;
}

// No segment of this problem is wider.
VSS_HD int widest_segment(const SegArgmaxParams& p, float scale_w) {
    const auto bound = static_cast<int64_t>(scale_w * kSegment) + 4;
    return static_cast<int>(bound < p.in_w ? bound : p.in_w);
}

VSS_HD SegPlan seg_plan(const SegArgmaxParams& p) {
    SegPlan plan{};
    plan.scale_h = resize_scale(p.in_h, p.out_h, p.align_corners);
    plan.scale_w = resize_scale(p.in_w, p.out_w, p.align_corners);
    plan.segments = ceil_div(p.out_w, kSegment);
    plan.bands = ceil_div(p.out_h, kBand);
    plan.staged = 2 * int64_t{stage_pitch(widest_segment(p, plan.scale_w))} <= kStage;
    const auto address = p.wide_labels != nullptr ? reinterpret_cast<uintptr_t>(p.wide_labels) / sizeof(int32_t)
                                                  : reinterpret_cast<uintptr_t>(p.labels);
    plan.vectors = p.out_w % kPixels == 0 && address % kPixels == 0;
    return plan;
}

VSS_HD int64_t seg_blocks(const SegArgmaxParams& p, const SegPlan& plan) {
    return p.batch * plan.bands * plan.segments;
}

VSS_HD Tap row_tap(const SegArgmaxParams& p, const SegPlan& plan, int64_t y) {
    return resize_tap(static_cast<int32_t>(y), static_cast<int32_t>(p.in_h), static_cast<int32_t>(p.out_h),
                      plan.scale_h, p.align_corners);
}

// Columns past the image repeat the last one.
VSS_HD Tap column_tap(const SegArgmaxParams& p, const SegPlan& plan, int64_t x) {
    x = x < p.out_w ? x : p.out_w - 1;
    return resize_tap(static_cast<int32_t>(x), static_cast<int32_t>(p.in_w), static_cast<int32_t>(p.out_w),
                      plan.scale_w, p.align_corners);
}

// One block: rows y..y_end and columns first..last of image n; they read `width` input columns from `low` on.
struct SegmentAt {
    int64_t n, y, y_end, first, last;
    int32_t low, width;
};

VSS_HD SegmentAt segment_at(uint32_t block, const SegArgmaxParams& p, const SegPlan& plan) {
    const auto segments = static_cast<uint32_t>(plan.segments), bands = static_cast<uint32_t>(plan.bands);
    const uint32_t line = block / segments;
    SegmentAt at{};
    at.n = line / bands;
    at.y = int64_t{line % bands} * kBand;
    at.y_end = at.y + kBand < p.out_h ? at.y + kBand : p.out_h;
    at.first = int64_t{block % segments} * kSegment;
    at.last = at.first + kSegment < p.out_w ? at.first + kSegment - 1 : p.out_w - 1;
    at.low = column_tap(p, plan, at.first).i0;
    at.width = column_tap(p, plan, at.last).i1 - at.low + 1;
    return at;
}

// Output rows y, y + 1 and so on that read the same two input rows, and their weights.
struct RowRun {
    int32_t i0, i1;
    int count;
    float w0[kBand], w1[kBand];
};

VSS_HD RowRun row_run(const SegArgmaxParams& p, const SegPlan& plan, int64_t y, int64_t y_end) {
    RowRun run{};
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int r = 0; r < kBand; ++r) {
        const Tap tap = row_tap(p, plan, y + r < y_end ? y + r : y_end - 1);
        if (r == 0) run.i0 = tap.i0, run.i1 = tap.i1;
        run.w0[r] = tap.w0, run.w1[r] = tap.w1;
        if (run.count == r && y + r < y_end && tap.i0 == run.i0 && tap.i1 == run.i1) ++run.count;
    }
    return run;
}

}  // namespace vss
