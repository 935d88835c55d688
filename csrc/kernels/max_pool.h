// Max pooling over windows that touch but do not overlap, with the position of each maximum, and its inverse: the pair
// of operations of SegNet. Positions are int32 within a map (y * width + x), as TensorRT hosts need them.
#pragma once

#include "common.h"

namespace vss {

struct MaxPoolParams {
    const void* input;  // pool: (batch, channels, height, width); unpool: values (batch, channels, pooled_h, pooled_w)
    DType dtype;
    int64_t batch, channels, height, width;  // of the large maps
    int64_t pooled_h, pooled_w;
    int64_t kernel;     // pool only: window side and stride
    int64_t stride[4];  // of `input`: n, c, h, w, in elements
    int32_t* indices;   // (batch, channels, pooled_h, pooled_w), contiguous; unpool reads them
    void* output;       // contiguous, of the same dtype; unpool: (batch, channels, height, width), zero before
    int threads;        // CPU only: at least 1
};

// The first maximum of a window in reading order wins; a NaN counts as the largest value, as in torch. Rows and columns
// that do not fill a window are left out.
Status max_pool_cpu(const MaxPoolParams& p);
Status max_pool_cuda(const MaxPoolParams& p, CUstream_st* stream);

// output[b, c, indices] = values; with indices of max_pool no two values meet. A value whose index is outside its map
// is left out.
Status max_unpool_cpu(const MaxPoolParams& p);
Status max_unpool_cuda(const MaxPoolParams& p, CUstream_st* stream);

}  // namespace vss
