// The torch host: per op one block that checks, allocates and calls the kernel. Schemas, references and fakes are in
// vss/ops/reference.py; the dispatcher prefers these kernels as soon as this library is loaded.
#include <torch/library.h>

#include "host.h"
#include "max_pool.h"
#include "seg_argmax.h"

namespace vss {
namespace {

// seg_argmax -----------------------------------------------------------------------------------------------------

Tensor seg_argmax(const Tensor& logits, at::IntArrayRef size, bool align_corners) {
    constexpr const char* op = "seg_argmax";
    check_dim(op, "logits", "(N, K, h, w)", logits, 4);
    check_dtype(op, "logits", logits);
    check_int32(op, "logits", logits);
    TORCH_CHECK_VALUE(logits.size(1) >= 1 && logits.size(1) <= kSegArgmaxMaxClasses, op,
                      ": labels are uint8, so logits must have 1 to 256 classes, got ", logits.size(1), ".");
    TORCH_CHECK_VALUE(logits.size(2) >= 1 && logits.size(3) >= 1, op, ": logits has no pixels, got shape ",
                      logits.sizes(), ".");
    TORCH_CHECK_VALUE(size.size() == 2 && size[0] >= 1 && size[1] >= 1 && std::max(size[0], size[1]) <= kInt32Max, op,
                      ": size must be two positive integers (H, W), got ", size, ".");
    Tensor labels = at::empty({logits.size(0), size[0], size[1]}, logits.options().dtype(at::kByte));
    if (labels.numel() == 0) return labels;
    SegArgmaxParams p{};
    p.logits = logits.const_data_ptr();
    p.dtype = dtype_of(logits);
    p.batch = logits.size(0), p.classes = logits.size(1), p.in_h = logits.size(2), p.in_w = logits.size(3);
    p.out_h = size[0], p.out_w = size[1];
    p.stride_n = logits.stride(0), p.stride_c = logits.stride(1);
    p.stride_h = logits.stride(2), p.stride_w = logits.stride(3);
    p.align_corners = align_corners;
    p.labels = labels.mutable_data_ptr<uint8_t>();
    p.threads = cpu_threads();
    const Tensor workspace = floats_for(logits, VSS_ON_DEVICE(logits, 0, seg_argmax_workspace(p)));
    p.workspace = workspace.mutable_data_ptr<float>();
    launch(op, logits, p, seg_argmax_cpu, VSS_CUDA_LAUNCHER(seg_argmax_cuda));
    return labels;
}

// max_pool_indices, max_unpool -----------------------------------------------------------------------------------

MaxPoolParams pool_params(const Tensor& input, int64_t height, int64_t width, int64_t pooled_h, int64_t pooled_w) {
    MaxPoolParams p{};
    p.input = input.const_data_ptr();
    p.dtype = dtype_of(input);
    p.batch = input.size(0), p.channels = input.size(1);
    p.height = height, p.width = width, p.pooled_h = pooled_h, p.pooled_w = pooled_w;
    std::copy_n(input.strides().begin(), 4, p.stride);
    p.threads = cpu_threads();
    return p;
}

void check_map_size(const char* op, int64_t height, int64_t width) {
    TORCH_CHECK_VALUE(height <= kInt32Max && width <= kInt32Max && height * width <= kInt32Max, op, ": a map of ",
                      height, "x", width, " is over the int32 range of its indices.");
}

std::tuple<Tensor, Tensor> max_pool_indices(const Tensor& x, int64_t kernel) {
    constexpr const char* op = "max_pool_indices";
    check_maps(op, "x", "(B, C, H, W)", x);
    TORCH_CHECK_VALUE(kernel >= 1 && x.size(2) >= kernel && x.size(3) >= kernel, op,
                      ": kernel must be at least 1 and fit into the map, got ", kernel, " for shape ", x.sizes(), ".");
    check_map_size(op, x.size(2), x.size(3));
    const int64_t pooled_h = x.size(2) / kernel, pooled_w = x.size(3) / kernel;
    Tensor values = at::empty({x.size(0), x.size(1), pooled_h, pooled_w}, x.options());
    Tensor indices = at::empty(values.sizes(), x.options().dtype(at::kInt));
    if (values.numel() == 0) return {values, indices};
    MaxPoolParams p = pool_params(x, x.size(2), x.size(3), pooled_h, pooled_w);
    p.kernel = kernel;
    p.output = values.mutable_data_ptr();
    p.indices = indices.mutable_data_ptr<int32_t>();
    launch(op, x, p, max_pool_cpu, VSS_CUDA_LAUNCHER(max_pool_cuda));
    return {values, indices};
}

#ifdef VSS_WITH_CUDA
// On CUDA alone: the CPU kernel gains too little over torch's scatter, which the reference is.
Tensor max_unpool(const Tensor& values, const Tensor& indices, at::IntArrayRef size) {
    constexpr const char* op = "max_unpool";
    check_maps(op, "values", "(B, C, h, w)", values);
    TORCH_CHECK_VALUE(indices.sizes() == values.sizes() && indices.scalar_type() == at::kInt, op,
                      ": indices must be int32 of shape ", values.sizes(), ", got ", indices.dtype(), " of shape ",
                      indices.sizes(), ".");
    check_same_device(op, values, indices);
    TORCH_CHECK_VALUE(size.size() == 2 && size[0] >= 1 && size[1] >= 1, op,
                      ": size must be two positive integers (H, W), got ", size, ".");
    check_map_size(op, size[0], size[1]);
    Tensor output = at::zeros({values.size(0), values.size(1), size[0], size[1]}, values.options());
    if (values.numel() == 0) return output;
    const Tensor kept = indices.contiguous();
    MaxPoolParams p = pool_params(values, size[0], size[1], values.size(2), values.size(3));
    p.output = output.mutable_data_ptr();
    p.indices = const_cast<int32_t*>(kept.const_data_ptr<int32_t>());
    launch(op, values, p, max_unpool_cpu, max_unpool_cuda);
    return output;
}
#endif

void register_ops(torch::Library& library) {
    library.impl("max_pool_indices", max_pool_indices);
    library.impl("seg_argmax", seg_argmax);
}

}  // namespace

TORCH_LIBRARY_IMPL(vss, CPU, library) {
    register_ops(library);
}

#ifdef VSS_WITH_CUDA
TORCH_LIBRARY_IMPL(vss, CUDA, library) {
    register_ops(library);
    library.impl("max_unpool", max_unpool);
}
#endif

}  // namespace vss
