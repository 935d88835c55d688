// What every CUDA kernel shares: element loads as float, launches, and the sum of what several blocks made of a map.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common.h"

namespace vss {

__device__ __forceinline__ float load(const float* p) {
    return __ldg(p);
}
__device__ __forceinline__ float load(const __half* p) {
    return __half2float(__ldg(p));
}
__device__ __forceinline__ float load(const __nv_bfloat16* p) {
    return __bfloat162float(__ldg(p));
}

// Returns visit(pointer of the element type) for the type that `dtype` names.
template <typename Visit>
Status visit_dtype(const void* data, DType dtype, Visit visit) {
    switch (dtype) {
        case DType::f32:
            return visit(static_cast<const float*>(data));
        case DType::f16:
            return visit(static_cast<const __half*>(data));
        case DType::bf16:
            return visit(static_cast<const __nv_bfloat16*>(data));
    }
    return Status::bad_argument;
}

// Errors that a launch reports but cannot cause: the device met them in a kernel before.
inline bool of_an_earlier_kernel(cudaError_t error) {
    switch (error) {
        case cudaErrorIllegalAddress:
        case cudaErrorLaunchFailure:
        case cudaErrorLaunchTimeout:
        case cudaErrorAssert:
        case cudaErrorHardwareStackError:
        case cudaErrorIllegalInstruction:
        case cudaErrorMisalignedAddress:
        case cudaErrorInvalidAddressSpace:
        case cudaErrorInvalidPc:
        case cudaErrorECCUncorrectable:
            return true;
        default:
            return false;
    }
}

template <typename T>
struct Same {
    using Type = T;
};

// Launches a kernel. The error is that of this very launch, not the last one that somebody left behind.
template <typename... Given>
Status launch(void (*kernel)(Given...), int64_t blocks, int threads, CUstream_st* stream,
              typename Same<Given>::Type... given) {
    if (blocks > kMaxBlocks) return Status::bad_argument;
    if (blocks == 0) return Status::ok;
    void* arguments[] = {&given...};
    const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
    const cudaError_t error = cudaLaunchKernel(kernel, grid, block, arguments, 0, stream);
    if (error == cudaSuccess) return Status::ok;
    static_cast<void>(cudaGetLastError());  // it is reported here; nobody shall find it again
    return {of_an_earlier_kernel(error) ? Status::earlier_failed : Status::launch_failed, cudaGetErrorString(error)};
}

constexpr unsigned kAll = 0xffffffffu;

// Adds what the lanes of a warp hold, all of which take part; lane 0 has the sum.
template <typename Sums>
__device__ __forceinline__ void add_lanes(Sums& sums) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        Sums other = sums;
        other.each([step](auto& value) { value = __shfl_down_sync(kAll, value, step); });
        sums.add(other);
    }
}

constexpr int kAddThreads = 256;
constexpr int kAddMaps = kAddThreads / 32;  // of a block

// out[map] = the columns of the sum of parts[0][map], parts[1][map] and so on, by a warp; in an order that is always
// the same, so reproducible.
template <typename Sums>
__global__ void __launch_bounds__(kAddThreads) add_parts(const Sums* parts, int64_t maps, int count, float* out) {
    const int64_t map = blockIdx.x * int64_t{kAddMaps} + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (map >= maps) return;
    Sums sum{};
    for (int part = lane; part < count; part += 32) sum.add(parts[part * maps + map]);
    add_lanes(sum);
    if (lane == 0) sum.store(out + map * Sums::kColumns);
}

}  // namespace vss
