// Accumulated Gram matrix of feature maps: total += sum over b of Y_b Y_b^T with Y_b[c, p] = (x[b, c, p] - mean[c]) /
// norm[b, c]. Only one triangle is computed; no copy of x and no matrix per image exist.
#pragma once

#include "common.h"

namespace vss {

struct GramParams {
    const void* maps;  // (batch, channels, height, width), any strides
    DType dtype;
    int64_t batch, channels, height, width;
    int64_t stride_n, stride_c, stride_h, stride_w;  // in elements
    const float* norms;                              // (batch, channels) or null: 1
    const float* means;                              // (channels) or null: 0
    float* total;                                    // (channels, channels), contiguous, symmetric before and after
    float* workspace;                                // gram_workspace() floats, or gram_workspace_cuda() on CUDA
    int threads;                                     // CPU only: at least 1
};

int64_t gram_workspace(const GramParams& p);
int64_t gram_workspace_cuda(const GramParams& p);

// Products and sums are float32. On CUDA a factor counts with 22 of its 24 bits, so a product is off by 2^-21 of itself
// at most, and sums of 32 positions are cut off to float32, not rounded.
Status gram_cpu(const GramParams& p);
Status gram_cuda(const GramParams& p, CUstream_st* stream);

}  // namespace vss
