// What every op of the torch host shares: argument checks with full messages, and the status of a kernel.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#ifdef VSS_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"

namespace vss {

using at::Tensor;

constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();

inline bool is_half_or_float(const Tensor& t) {
    const auto type = t.scalar_type();
    return type == at::kFloat || type == at::kHalf || type == at::kBFloat16;
}

inline void check_dtype(const char* op, const char* name, const Tensor& t) {
    TORCH_CHECK_VALUE(is_half_or_float(t), op, ": ", name, " must be float32, float16 or bfloat16, got ", t.dtype(),
                      "; convert it with ", name, ".float().");
}

inline void check_dim(const char* op, const char* name, const char* layout, const Tensor& t, int64_t dim) {
    TORCH_CHECK_VALUE(t.dim() == dim, op, ": ", name, " must be ", layout, ", got shape ", t.sizes(), ".");
}

inline void check_int32(const char* op, const char* name, const Tensor& t) {
    for (const int64_t size : t.sizes()) {
        TORCH_CHECK_VALUE(size <= kInt32Max, op, ": ", name, " of shape ", t.sizes(),
                          " has a side over the int32 range.");
    }
}

// Maps (B, C, H, W) of a known dtype, with at least one channel and sides in the int32 range.
inline void check_maps(const char* op, const char* name, const char* layout, const Tensor& t) {
    check_dim(op, name, layout, t, 4);
    check_dtype(op, name, t);
    check_int32(op, name, t);
    TORCH_CHECK_VALUE(t.size(1) >= 1, op, ": ", name, " has no channels, got shape ", t.sizes(), ".");
}

inline DType dtype_of(const Tensor& t) {
    return t.scalar_type() == at::kFloat ? DType::f32 : t.scalar_type() == at::kHalf ? DType::f16 : DType::bf16;
}

inline void check_status(const char* op, Status status) {
    TORCH_CHECK(status != Status::launch_failed, op, ": the CUDA kernel could not be launched: ", status.text,
                "; `vss doctor` says for which architectures the extension was built.");
    TORCH_CHECK(status != Status::earlier_failed, op,
                ": did not run, CUDA reports the failure of an earlier kernel: ", status.text,
                "; CUDA_LAUNCH_BLOCKING=1 names that kernel.");
    TORCH_CHECK(status == Status::ok, op, ": the kernel refused its arguments.");
}

inline void check_same_device(const char* op, const Tensor& first, const Tensor& other) {
    TORCH_CHECK_VALUE(first.device() == other.device(), op, ": all tensors must be on one device, got ", first.device(),
                      " and ", other.device(), ".");
}

// A list of plain structs as bytes where the kernel reads it. On the way to a device it passes through pinned memory,
// so that neither the copy nor its buffer's release waits for the device.
template <typename Item>
Tensor items_for(const Tensor& t, const std::vector<Item>& items) {
    const auto bytes = static_cast<int64_t>(items.size() * sizeof(Item));
    const Tensor list = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(!t.is_cpu()));
    std::memcpy(list.mutable_data_ptr(), items.data(), static_cast<size_t>(bytes));
    return t.is_cpu() ? list : list.to(t.device(), /*non_blocking=*/true);
}

// A workspace of so many floats on the device of `t`.
inline Tensor floats_for(const Tensor& t, int64_t count) {
    return at::empty({count}, t.options().dtype(at::kFloat));
}

inline int cpu_threads() {
    return std::max(1, at::get_num_threads());
}

// Runs `cpu(params)` or `cuda(params, stream)`, on the device and current stream of `t`.
template <typename Params, typename Cuda>
void launch(const char* op, const Tensor& t, const Params& params, Status (*cpu)(const Params&),
            [[maybe_unused]] Cuda cuda) {
#ifdef VSS_WITH_CUDA
    if (t.is_cuda()) {
        const c10::cuda::CUDAGuard guard(t.device());
        check_status(op, cuda(params, c10::cuda::getCurrentCUDAStream().stream()));
        return;
    }
#endif
    TORCH_CHECK(t.is_cpu(), op, ": there is no native kernel for device ", t.device(), ".");
    check_status(op, cpu(params));
}

}  // namespace vss

// Without CUDA the launchers are not linked in: name them through these.
#ifdef VSS_WITH_CUDA
#define VSS_CUDA_LAUNCHER(function) (function)
#define VSS_ON_DEVICE(t, cuda, cpu) ((t).is_cuda() ? (cuda) : (cpu))
#else
#define VSS_CUDA_LAUNCHER(function) nullptr
#define VSS_ON_DEVICE(t, cuda, cpu) (cpu)
#endif
