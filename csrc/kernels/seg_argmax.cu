// CUDA: a block per segment of 512 output columns; see seg_argmax.cuh.
#include "seg_argmax.cuh"

namespace vss {
namespace {

constexpr int64_t kMaxBlocks = 2147483647;

template <typename T>
__global__ void __launch_bounds__(kThreads) staged(SegArgmaxParams p, const T* logits) {
    staged_block(p, logits);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) direct(SegArgmaxParams p, const T* logits) {
    direct_block(p, logits);
}

}  // namespace

Status seg_argmax_cuda(const SegArgmaxParams& p, CUstream_st* stream) {
    const int64_t blocks = segment_count(p);
    if (p.classes < 1 || p.classes > kSegArgmaxMaxClasses || blocks > kMaxBlocks) return Status::bad_argument;
    if (blocks == 0) return Status::ok;
    const bool fits = stage_pitch(widest_segment(p)) <= kStage;
    visit_dtype(p.logits, p.dtype, [&](auto* logits) {
        const auto kernel = fits ? staged<std::decay_t<decltype(*logits)>> : direct<std::decay_t<decltype(*logits)>>;
        kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p, logits);
    });
    return launch_status();
}

}  // namespace vss
