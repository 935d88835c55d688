// Experimental: VssSegArgmax as kernels that TensorRT launches itself, from PTX that lies inside the engine. Arguments
// are inputs, integers, outputs, as TensorRT's ahead-of-time Python plugins pass them; `vss.deploy.backends.trt_aot`
// launches ceil(out_w / 512) * out_h * n blocks of 128 threads, of which those past the last segment have nothing to
// do.
//
//   nvcc -ptx -std=c++17 -arch=compute_80 -I csrc/kernels plugins_trt/seg_argmax_aot.cu -o seg_argmax.ptx
#include <cmath>

#include "seg_argmax.cuh"

namespace {

template <typename T>
__device__ __forceinline__ void labels_of(const T* logits, int n, int classes, int h, int w, int out_h, int out_w,
                                          int align_corners, int* labels) {
    vss::SegArgmaxParams p{};
    p.batch = n, p.classes = classes, p.in_h = h, p.in_w = w, p.out_h = out_h, p.out_w = out_w;
    p.stride_w = 1, p.stride_h = w, p.stride_c = int64_t{h} * w, p.stride_n = classes * p.stride_c;
    p.align_corners = align_corners != 0;
    p.wide_labels = labels;
    const vss::SegPlan plan = vss::seg_plan(p);
    if (blockIdx.x >= vss::seg_blocks(p, plan)) return;
    if (plan.staged) {
        vss::staged_block(p, plan, logits);
    } else {
        vss::direct_block(p, plan, logits);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(vss::kThreads)
    vss_seg_argmax_f32(const float* logits, int n, int classes, int h, int w, int out_h, int out_w, int align_corners,
                       int* labels) {
    labels_of(logits, n, classes, h, w, out_h, out_w, align_corners, labels);
}

extern "C" __global__ void __launch_bounds__(vss::kThreads)
    vss_seg_argmax_f16(const __half* logits, int n, int classes, int h, int w, int out_h, int out_w, int align_corners,
                       int* labels) {
    labels_of(logits, n, classes, h, w, out_h, out_w, align_corners, labels);
}
