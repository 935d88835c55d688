// Per-map sums of activation times gradient, under an optional mask of positions, in one read of both.
#pragma once

#include "common.h"

namespace vss {

// Columns of the result.
enum ChannelMoment : int { kProductSum, kAbsProductSum, kAbsActivationSum, kGradientSum, kChannelMoments };

struct ChannelMomentsParams {
    const void* activation;  // (batch, channels, height, width), any strides
    const void* gradient;    // same sizes and dtype, its own strides
    DType dtype;
    int64_t batch, channels, height, width;
    int64_t stride_a[4], stride_g[4];  // n, c, h, w, in elements
    const float* mask;                 // (batch, height, width), contiguous, or null: 1
    float* moments;                    // (batch, channels, kChannelMoments)
    float* workspace;                  // channel_moments_workspace() floats, or ..._cuda() on CUDA, aligned for doubles
    int threads;                       // CPU only: at least 1
};

int64_t channel_moments_workspace(const ChannelMomentsParams& p);
int64_t channel_moments_workspace_cuda(const ChannelMomentsParams& p);

Status channel_moments_cpu(const ChannelMomentsParams& p);
Status channel_moments_cuda(const ChannelMomentsParams& p, CUstream_st* stream);

// Sums over one map: of a*g*m, |a*g|*m, |a|*m and g*m.
template <typename Real>
struct MomentSums {
    static constexpr int kColumns = kChannelMoments;

    Real product, abs_product, abs_activation, gradient;

    template <typename Other>
    VSS_HD void add(const MomentSums<Other>& part) {
        product += part.product, abs_product += part.abs_product;
        abs_activation += part.abs_activation, gradient += part.gradient;
    }

    VSS_CALLS_EITHER
    template <typename Visit>
    VSS_HD void each(const Visit& visit) {
        visit(product), visit(abs_product), visit(abs_activation), visit(gradient);
    }

    VSS_HD void store(float* moments) const {
        moments[kProductSum] = static_cast<float>(product);
        moments[kAbsProductSum] = static_cast<float>(abs_product);
        moments[kAbsActivationSum] = static_cast<float>(abs_activation);
        moments[kGradientSum] = static_cast<float>(gradient);
    }
};

}  // namespace vss
