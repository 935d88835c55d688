// CUDA: a block per segment of 512 output columns and four rows; see seg_argmax.cuh.
#include <cmath>

#include "seg_argmax.cuh"

namespace vss {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) staged(SegArgmaxParams p, const T* logits, SegPlan plan) {
    staged_block(p, plan, logits);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) direct(SegArgmaxParams p, const T* logits, SegPlan plan) {
    direct_block(p, plan, logits);
}

}  // namespace

Status seg_argmax_cuda(const SegArgmaxParams& p, CUstream_st* stream) {
    if (p.classes < 1 || p.classes > kSegArgmaxMaxClasses) return Status::bad_argument;
    const SegPlan plan = seg_plan(p);
    return visit_dtype(p.logits, p.dtype, [&](auto* logits) {
        using T = std::decay_t<decltype(*logits)>;
        return launch(plan.staged ? staged<T> : direct<T>, seg_blocks(p, plan), kThreads, stream, p, logits, plan);
    });
}

}  // namespace vss
