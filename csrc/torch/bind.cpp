// The torch host: per op one block that checks, allocates and calls the kernel. Schemas, references and fakes are in
// vss/ops/reference.py; the dispatcher prefers these kernels as soon as this library is loaded.
#include <torch/library.h>

#include "greedy.h"
#include "host.h"
#include "map_stats.h"
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
    TORCH_CHECK_VALUE(size.size() == 2 && size[0] >= 1 && size[1] >= 1 && std::max(size[0], size[1]) <= 2147483647, op,
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
    Tensor workspace;
    if (logits.is_cpu()) {
        workspace = at::empty({seg_argmax_workspace(p)}, logits.options().dtype(at::kFloat));
        p.workspace = workspace.mutable_data_ptr<float>();
    }
    launch(op, logits, p, seg_argmax_cpu, VSS_CUDA_LAUNCHER(seg_argmax_cuda));
    return labels;
}

// greedy_order ---------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> greedy_order(at::TensorList similarity) {
    constexpr const char* op = "greedy_order";
    int64_t total = 0;
    for (const Tensor& a : similarity) {
        TORCH_CHECK_VALUE(a.dim() == 2 && a.size(0) == a.size(1), op,
                          ": a similarity matrix must be (C, C), got shape ", a.sizes(), ".");
        TORCH_CHECK_VALUE(a.size(0) >= 1 && a.size(0) <= kGreedyMaxChannels, op,
                          ": a similarity matrix must have 1 to 65536 channels, got ", a.size(0), ".");
        TORCH_CHECK_VALUE(a.scalar_type() == at::kFloat, op, ": a similarity matrix must be float32, got ", a.dtype(),
                          ".");
        check_same_device(op, similarity[0], a);
        total += a.size(0);
    }
    const auto options = similarity[0].options();
    Tensor order = at::empty({total}, options.dtype(at::kLong)), value = at::empty({total}, options.dtype(at::kDouble));
    std::vector<GreedyMatrix> matrices;
    std::vector<Tensor> held;
    for (int64_t offset = 0; const Tensor& a : similarity) {
        held.push_back(a.stride(1) == 1 || a.size(1) == 1 ? a : a.contiguous());
        const Tensor& m = held.back();
        matrices.push_back({m.const_data_ptr<float>(), m.size(0), m.stride(0),
                            order.mutable_data_ptr<int64_t>() + offset, value.mutable_data_ptr<double>() + offset});
        offset += m.size(0);
    }
    GreedyParams p{matrices.data(), static_cast<int64_t>(matrices.size()), cpu_threads(), nullptr};
    const ItemsOnDevice<GreedyMatrix> items(matrices, order);
    Tensor workspace;
    if (order.is_cpu()) {
        workspace = at::empty({greedy_workspace(p)}, options.dtype(at::kDouble));
        p.workspace = workspace.mutable_data_ptr<double>();
    }
    p.matrices = items.data();
    launch(op, order, p, greedy_cpu, VSS_CUDA_LAUNCHER(greedy_cuda));
    return {order, value};
}

// map_stats ------------------------------------------------------------------------------------------------------

Tensor map_stats(const Tensor& x, c10::string_view padding) {
    constexpr const char* op = "map_stats";
    check_dim(op, "x", "(B, C, H, W)", x, 4);
    check_dtype(op, "x", x);
    check_int32(op, "x", x);
    TORCH_CHECK_VALUE(x.size(2) >= 1 && x.size(3) >= 1, op, ": x has no positions, got shape ", x.sizes(), ".");
    TORCH_CHECK_VALUE(padding == "replicate" || padding == "zeros", op,
                      ": padding must be 'replicate' or 'zeros', got '", padding, "'.");
    Tensor stats = at::empty({x.size(0), x.size(1), kMapStats}, x.options().dtype(at::kFloat));
    if (stats.numel() == 0) return stats;
    MapStatsParams p{};
    p.maps = x.const_data_ptr();
    p.dtype = dtype_of(x);
    p.batch = x.size(0), p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
    p.stride_n = x.stride(0), p.stride_c = x.stride(1), p.stride_h = x.stride(2), p.stride_w = x.stride(3);
    p.zero_padding = padding == "zeros";
    p.stats = stats.mutable_data_ptr<float>();
    p.threads = cpu_threads();
    Tensor workspace;
    if (x.is_cpu()) {
        workspace = at::empty({map_stats_workspace(p)}, stats.options());
        p.workspace = workspace.mutable_data_ptr<float>();
    }
    launch(op, x, p, map_stats_cpu, VSS_CUDA_LAUNCHER(map_stats_cuda));
    return stats;
}

void register_ops(torch::Library& library) {
    library.impl("seg_argmax", seg_argmax);
    library.impl("greedy_order", greedy_order);
    library.impl("map_stats", map_stats);
}

}  // namespace

TORCH_LIBRARY_IMPL(vss, CPU, library) {
    register_ops(library);
}

#ifdef VSS_WITH_CUDA
TORCH_LIBRARY_IMPL(vss, CUDA, library) {
    register_ops(library);
}
#endif

}  // namespace vss
