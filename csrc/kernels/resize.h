// Coordinates of bilinear resizing as torch.nn.functional.interpolate(mode="bilinear", antialias=False) defines them
// (ATen/native/UpSample.h, area_pixel_compute_source_index). Shared by CPU and CUDA, in float as torch does it.
#pragma once

#include "common.h"

namespace vss {

// One output coordinate reads w0 * in[i0] + w1 * in[i1].
struct Tap {
    int32_t i0, i1;
    float w0, w1;
};

VSS_HD float resize_scale(int64_t in, int64_t out, bool align_corners) {
    if (align_corners) return out > 1 ? static_cast<float>(in - 1) / static_cast<float>(out - 1) : 0.0f;
    return static_cast<float>(in) / static_cast<float>(out);
}

VSS_HD Tap resize_tap(int32_t at, int32_t in, int32_t out, float scale, bool align_corners) {
    if (in == out) return {at, at, 1.0f, 0.0f};
    float source = align_corners ? scale * static_cast<float>(at) : scale * (static_cast<float>(at) + 0.5f) - 0.5f;
    source = source < 0.0f ? 0.0f : source;
    int32_t i0 = static_cast<int32_t>(source);
    i0 = i0 < in - 1 ? i0 : in - 1;
    float w1 = source - static_cast<float>(i0);
    w1 = w1 < 0.0f ? 0.0f : (w1 > 1.0f ? 1.0f : w1);
    return {i0, i0 + (i0 < in - 1 ? 1 : 0), 1.0f - w1, w1};
}

}  // namespace vss
