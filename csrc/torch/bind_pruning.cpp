// The torch host of the ops that score channels; bind.cpp has those that run inside networks.
#include <torch/library.h>

#include <array>

#include "channel_moments.h"
#include "gram.h"
#include "greedy.h"
#include "host.h"
#include "map_stats.h"
#include "weight_reduce_tile.h"

namespace vss {
namespace {

void check_extra(const char* op, const char* name, const std::optional<Tensor>& extra, const Tensor& x,
                 at::IntArrayRef shape) {
    if (!extra) return;
    TORCH_CHECK_VALUE(extra->sizes() == shape && extra->scalar_type() == at::kFloat, op, ": ", name,
                      " must be float32 of shape ", shape, ", got ", extra->dtype(), " of shape ", extra->sizes(), ".");
    check_same_device(op, x, *extra);
}

// map_stats ------------------------------------------------------------------------------------------------------

Tensor map_stats(const Tensor& x, c10::string_view padding) {
    constexpr const char* op = "map_stats";
    check_maps(op, "x", "(B, C, H, W)", x);
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
    const Tensor workspace = floats_for(stats, VSS_ON_DEVICE(x, map_stats_workspace_cuda(p), map_stats_workspace(p)));
    p.workspace = workspace.mutable_data_ptr<float>();
    launch(op, x, p, map_stats_cpu, VSS_CUDA_LAUNCHER(map_stats_cuda));
    return stats;
}

// channel_moments ------------------------------------------------------------------------------------------------

Tensor channel_moments(const Tensor& activation, const Tensor& gradient, const std::optional<Tensor>& mask) {
    constexpr const char* op = "channel_moments";
    check_maps(op, "activation", "(B, C, H, W)", activation);
    TORCH_CHECK_VALUE(gradient.sizes() == activation.sizes() && gradient.dtype() == activation.dtype(), op,
                      ": gradient must match activation, got ", gradient.dtype(), " of shape ", gradient.sizes(),
                      " for ", activation.dtype(), " of shape ", activation.sizes(), ".");
    check_same_device(op, activation, gradient);
    const std::array<int64_t, 3> mask_shape = {activation.size(0), activation.size(2), activation.size(3)};
    check_extra(op, "mask", mask, activation, mask_shape);
    Tensor moments =
        at::empty({activation.size(0), activation.size(1), kChannelMoments}, activation.options().dtype(at::kFloat));
    if (moments.numel() == 0) return moments;
    const Tensor mask_kept = mask ? mask->contiguous() : Tensor();
    ChannelMomentsParams p{};
    p.activation = activation.const_data_ptr();
    p.gradient = gradient.const_data_ptr();
    p.dtype = dtype_of(activation);
    p.batch = activation.size(0), p.channels = activation.size(1);
    p.height = activation.size(2), p.width = activation.size(3);
    std::copy_n(activation.strides().begin(), 4, p.stride_a);
    std::copy_n(gradient.strides().begin(), 4, p.stride_g);
    p.mask = mask ? mask_kept.const_data_ptr<float>() : nullptr;
    p.moments = moments.mutable_data_ptr<float>();
    p.threads = cpu_threads();
    const Tensor workspace =
        floats_for(moments, VSS_ON_DEVICE(activation, channel_moments_workspace_cuda(p), channel_moments_workspace(p)));
    p.workspace = workspace.mutable_data_ptr<float>();
    launch(op, activation, p, channel_moments_cpu, VSS_CUDA_LAUNCHER(channel_moments_cuda));
    return moments;
}

// gram_accumulate ------------------------------------------------------------------------------------------------

void gram_accumulate(Tensor& total, const Tensor& x, const std::optional<Tensor>& norms,
                     const std::optional<Tensor>& means) {
    constexpr const char* op = "gram_accumulate";
    check_maps(op, "x", "(B, C, H, W)", x);
    const int64_t channels = x.size(1);
    TORCH_CHECK_VALUE(total.sizes() == at::IntArrayRef({channels, channels}) && total.scalar_type() == at::kFloat &&
                          total.is_contiguous(),
                      op, ": total must be a contiguous float32 matrix of shape [", channels, ", ", channels, "], got ",
                      total.dtype(), " of shape ", total.sizes(), ".");
    check_same_device(op, x, total);
    check_extra(op, "norms", norms, x, {x.size(0), channels});
    check_extra(op, "means", means, x, {channels});
    if (x.numel() == 0) return;
    const Tensor norms_kept = norms ? norms->contiguous() : Tensor(),
                 means_kept = means ? means->contiguous() : Tensor();
    GramParams p{};
    p.maps = x.const_data_ptr();
    p.dtype = dtype_of(x);
    p.batch = x.size(0), p.channels = channels, p.height = x.size(2), p.width = x.size(3);
    p.stride_n = x.stride(0), p.stride_c = x.stride(1), p.stride_h = x.stride(2), p.stride_w = x.stride(3);
    p.norms = norms ? norms_kept.const_data_ptr<float>() : nullptr;
    p.means = means ? means_kept.const_data_ptr<float>() : nullptr;
    p.total = total.mutable_data_ptr<float>();
    p.threads = cpu_threads();
    const Tensor workspace = floats_for(total, VSS_ON_DEVICE(x, gram_workspace_cuda(p), gram_workspace(p)));
    p.workspace = workspace.mutable_data_ptr<float>();
    launch(op, x, p, gram_cpu, VSS_CUDA_LAUNCHER(gram_cuda));
}

// greedy_order ---------------------------------------------------------------------------------------------------

// Every step waits for the one before, and a matrix is small: elimination is work for the host, whatever device holds
// the matrices.
std::tuple<Tensor, Tensor> greedy_order(at::TensorList similarity) {
    constexpr const char* op = "greedy_order";
    int64_t total = 0;
    TORCH_CHECK_VALUE(!similarity.empty(), op, ": at least one similarity matrix is needed, got none.");
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
    const auto options = similarity[0].options().device(at::kCPU);
    Tensor order = at::empty({total}, options.dtype(at::kLong)), value = at::empty({total}, options.dtype(at::kDouble));
    std::vector<GreedyMatrix> matrices;
    std::vector<Tensor> held;
    for (int64_t offset = 0; const Tensor& a : similarity) {
        const Tensor here = a.cpu();
        held.push_back(here.stride(1) == 1 || here.size(1) == 1 ? here : here.contiguous());
        const Tensor& m = held.back();
        matrices.push_back({m.const_data_ptr<float>(), m.size(0), m.stride(0),
                            order.mutable_data_ptr<int64_t>() + offset, value.mutable_data_ptr<double>() + offset});
        offset += m.size(0);
    }
    GreedyParams p{matrices.data(), static_cast<int64_t>(matrices.size()), cpu_threads(), nullptr};
    Tensor workspace = at::empty({greedy_workspace(p)}, options.dtype(at::kDouble));
    p.workspace = workspace.mutable_data_ptr<double>();
    check_status(op, greedy_cpu(p));
    return {order.to(similarity[0].device()), value.to(similarity[0].device())};
}

// channel_reduce -------------------------------------------------------------------------------------------------

Reduce reduce_mode(const char* op, c10::string_view mode) {
    constexpr std::array<const char*, 4> names = {"l1", "l2", "product", "abs_product"};
    const auto found = std::find(names.begin(), names.end(), mode);
    TORCH_CHECK_VALUE(found != names.end(), op, ": mode must be 'l1', 'l2', 'product' or 'abs_product', got '", mode,
                      "'.");
    return static_cast<Reduce>(found - names.begin());
}

void check_channel_reduce(const char* op, at::TensorList weights, at::TensorList grads, at::IntArrayRef dims,
                          bool needs_grads) {
    TORCH_CHECK_VALUE(dims.size() == weights.size(), op, ": one dim per weight is needed, got ", weights.size(),
                      " weights and ", dims.size(), " dims.");
    TORCH_CHECK_VALUE(grads.size() == (needs_grads ? weights.size() : 0), op, ": the mode needs ",
                      needs_grads ? weights.size() : 0, " gradients, got ", grads.size(), ".");
    TORCH_CHECK_VALUE(!weights.empty(), op, ": at least one weight is needed, got none.");
    for (size_t i = 0; i < weights.size(); ++i) {
        const Tensor& w = weights[i];
        check_dtype(op, "a weight", w);
        check_int32(op, "a weight", w);
        TORCH_CHECK_VALUE(w.dtype() == weights[0].dtype(), op, ": all weights must have one dtype, got ",
                          weights[0].dtype(), " and ", w.dtype(), ".");
        check_same_device(op, weights[0], w);
        TORCH_CHECK_VALUE(dims[i] >= 0 && dims[i] < w.dim(), op, ": dim ", dims[i], " is outside a weight of shape ",
                          w.sizes(), ".");
        TORCH_CHECK_VALUE(w.size(dims[i]) >= 1, op, ": a weight has no channels along dim ", dims[i], ", got shape ",
                          w.sizes(), ".");
        if (!needs_grads) continue;
        TORCH_CHECK_VALUE(grads[i].sizes() == w.sizes() && grads[i].dtype() == w.dtype(), op,
                          ": a gradient must match its weight, got ", grads[i].dtype(), " of shape ", grads[i].sizes(),
                          " for ", w.dtype(), " of shape ", w.sizes(), ".");
        check_same_device(op, w, grads[i]);
    }
}

Tensor channel_reduce(at::TensorList weights, at::TensorList grads, at::IntArrayRef dims, c10::string_view mode) {
    constexpr const char* op = "channel_reduce";
    const Reduce reduce = reduce_mode(op, mode);
    const bool needs_grads = reduce == Reduce::product || reduce == Reduce::abs_product;
    check_channel_reduce(op, weights, grads, dims, needs_grads);
    int64_t total = 0;
    for (size_t i = 0; i < weights.size(); ++i) total += weights[i].size(dims[i]);
    Tensor sums = at::empty({total}, weights[0].options().dtype(at::kFloat));
    std::vector<ReduceTensor> tensors;
    std::vector<ReduceTask> tasks;
    std::vector<Tensor> held;
    float* out = sums.mutable_data_ptr<float>();
    for (size_t i = 0; i < weights.size(); ++i) {
        held.push_back(weights[i].contiguous());
        ReduceTensor t{held.back().const_data_ptr(), nullptr, 1, held.back().size(dims[i]), 1, out};
        for (int64_t d = 0; d < held.back().dim(); ++d) {
            if (d != dims[i]) (d < dims[i] ? t.outer : t.inner) *= held.back().size(d);
        }
        if (needs_grads) held.push_back(grads[i].contiguous()), t.grad = held.back().const_data_ptr();
        out += t.channels;
        const int64_t share =
            std::max<int64_t>(1, sums.is_cpu() ? reduce_channels_per_task(t) : reduce_channels_cuda(t));
        for (int64_t first = 0; first < t.channels; first += share) {
            tasks.push_back({static_cast<int32_t>(i), static_cast<int32_t>(first),
                             static_cast<int32_t>(std::min(first + share, t.channels))});
        }
        tensors.push_back(t);
    }
    const Tensor tensor_items = items_for(sums, tensors), task_items = items_for(sums, tasks);
    const WeightReduceParams p{static_cast<const ReduceTensor*>(tensor_items.const_data_ptr()),
                               static_cast<const ReduceTask*>(task_items.const_data_ptr()),
                               static_cast<int64_t>(tasks.size()),
                               dtype_of(weights[0]),
                               reduce,
                               cpu_threads()};
    launch(op, sums, p, weight_reduce_cpu, VSS_CUDA_LAUNCHER(weight_reduce_cuda));
    return sums;
}

void register_ops(torch::Library& library) {
    library.impl("channel_moments", channel_moments);
    library.impl("channel_reduce", channel_reduce);
    library.impl("gram_accumulate", gram_accumulate);
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
