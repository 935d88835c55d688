// Bilinear resize of class scores followed by argmax over classes, without the resized scores ever existing.
#pragma once

#include "common.h"

namespace vss {

constexpr int64_t kSegArgmaxMaxClasses = 256;

struct SegArgmaxParams {
    const void* logits;  // (batch, classes, in_h, in_w), any strides
    DType dtype;
    int64_t batch, classes, in_h, in_w, out_h, out_w;
    int64_t stride_n, stride_c, stride_h, stride_w;  // in elements
    bool align_corners;
    uint8_t* labels;                 // (batch, out_h, out_w), contiguous; not read where wide_labels is given
    float* workspace;                // CPU only: seg_argmax_workspace() floats
    int threads;                     // CPU only: at least 1
    int32_t* wide_labels = nullptr;  // the same as int32, for hosts without an 8-bit label type
};

// Floats of workspace that seg_argmax_cpu needs: two rows of a column block per class and thread.
int64_t seg_argmax_workspace(const SegArgmaxParams& p);

// Lowest class wins a tie; a NaN counts as the largest value and the first NaN wins, as in torch.argmax.
Status seg_argmax_cpu(const SegArgmaxParams& p);
Status seg_argmax_cuda(const SegArgmaxParams& p, CUstream_st* stream);

}  // namespace vss
