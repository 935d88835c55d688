// Index arithmetic of the CUDA seg_argmax, apart from it so that the host tests run the very same functions.
#pragma once

#include "resize.h"
#include "seg_argmax.h"

namespace vss {

constexpr int kPixels = 4;     // adjacent pixels of a thread
constexpr int kSegment = 512;  // output columns of a block
constexpr int kStage = 4096;   // floats of shared memory: 16 KiB

// One block: output columns first..last of row y of image n; they read `width` input columns from `low` on.
struct SegmentAt {
    int64_t n, y, first, last;
    int32_t low, width;
};

VSS_HD Tap row_tap(const SegArgmaxParams& p, int64_t y) {
    return resize_tap(static_cast<int32_t>(y), static_cast<int32_t>(p.in_h), static_cast<int32_t>(p.out_h),
                      resize_scale(p.in_h, p.out_h, p.align_corners), p.align_corners);
}

// Columns past the image repeat the last one.
VSS_HD Tap column_tap(const SegArgmaxParams& p, int64_t x) {
    x = x < p.out_w ? x : p.out_w - 1;
    return resize_tap(static_cast<int32_t>(x), static_cast<int32_t>(p.in_w), static_cast<int32_t>(p.out_w),
                      resize_scale(p.in_w, p.out_w, p.align_corners), p.align_corners);
}

VSS_HD int64_t segment_count(const SegArgmaxParams& p) {
    return p.batch * p.out_h * ceil_div(p.out_w, kSegment);
}

VSS_HD SegmentAt segment_at(int64_t block, const SegArgmaxParams& p) {
    const int64_t segments = ceil_div(p.out_w, kSegment), line = block / segments;
    SegmentAt at{};
    at.n = line / p.out_h;
    at.y = line % p.out_h;
    at.first = block % segments * kSegment;
    at.last = at.first + kSegment < p.out_w ? at.first + kSegment - 1 : p.out_w - 1;
    at.low = column_tap(p, at.first).i0;
    at.width = column_tap(p, at.last).i1 - at.low + 1;
    return at;
}

// An odd pitch spreads the classes of one column over the banks of shared memory.
VSS_HD int stage_pitch(int width) {
    return width | 1;
}

// No segment of this problem is wider.
VSS_HD int widest_segment(const SegArgmaxParams& p) {
    const auto bound = static_cast<int64_t>(resize_scale(p.in_w, p.out_w, p.align_corners) * kSegment) + 4;
    return static_cast<int>(bound < p.in_w ? bound : p.in_w);
}

}  // namespace vss
