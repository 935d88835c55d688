// What every CUDA kernel shares: element loads as float, and the status of a launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

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

// Calls visit(pointer of the element type) for the type that `dtype` names.
template <typename Visit>
void visit_dtype(const void* data, DType dtype, Visit visit) {
    switch (dtype) {
        case DType::f32:
            visit(static_cast<const float*>(data));
            break;
        case DType::f16:
            visit(static_cast<const __half*>(data));
            break;
        case DType::bf16:
            visit(static_cast<const __nv_bfloat16*>(data));
            break;
    }
}

inline Status launch_status() {
    return cudaGetLastError() == cudaSuccess ? Status::ok : Status::launch_failed;
}

}  // namespace vss
