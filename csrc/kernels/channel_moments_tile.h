// Index arithmetic and terms of the CUDA channel_moments, apart from it so that the host tests run the very same
// functions.
#pragma once

#include <cmath>

#include "channel_moments.h"

namespace vss {

constexpr int kMomentThreads = 256;
constexpr int kMomentWarps = kMomentThreads / 32;

// Whether lanes are channels (channels_last) or positions.
VSS_HD bool moments_by_channel(const ChannelMomentsParams& p) {
    return p.stride_a[1] < p.stride_a[3] && p.channels >= 16;
}

VSS_HD int64_t moment_offset(const int64_t (&stride)[4], int64_t n, int64_t c, int64_t position, int64_t width) {
    return n * stride[0] + c * stride[1] + position / width * stride[2] + position % width * stride[3];
}

VSS_HD void add_moment(MomentSums<float>& sums, float value, float slope, float weight) {
    const float both = value * slope;
    sums.product += both * weight;
    sums.abs_product += fabsf(both) * weight;
    sums.abs_activation += fabsf(value) * weight;
    sums.gradient += slope * weight;
}

// The sums of one lane over all warps.
VSS_HD MomentSums<double> lane_total(const MomentSums<float>* parts, int lane) {
    MomentSums<double> sum{};
    for (int w = 0; w < kMomentWarps; ++w) {
        const MomentSums<float>& part = parts[w * 32 + lane];
        sum.product += part.product, sum.abs_product += part.abs_product;
        sum.abs_activation += part.abs_activation, sum.gradient += part.gradient;
    }
    return sum;
}

}  // namespace vss
