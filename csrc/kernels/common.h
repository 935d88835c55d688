// What every kernel shares: status codes, element types, conversions, function multiversioning.
//
// Kernels know neither torch nor TensorRT. They take a plain struct of pointers, sizes and element strides, allocate
// nothing, throw nothing and return a Status; hosts check inputs, allocate outputs and workspaces, and pick threads.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(_OPENMP)
#include <omp.h>
#endif

#if defined(__CUDACC__)
#define VSS_HD __host__ __device__ __forceinline__
#else
#define VSS_HD inline
#endif

// Before a VSS_HD template that calls what it is given, which in kernels is device code alone.
#if defined(__CUDACC__)
#define VSS_CALLS_EITHER _Pragma("nv_exec_check_disable")
#else
#define VSS_CALLS_EITHER
#endif

// One binary for every x86-64: the loader picks the widest vector version of a function marked VSS_CLONES at start-up.
// Needs ifunc (glibc); elsewhere the compiler's baseline is used. The marked function must not be a template.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__CUDACC__)
#define VSS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#define VSS_HAS_CLONES 1
#else
#define VSS_CLONES
#define VSS_HAS_CLONES 0
#endif

// The opaque type behind cudaStream_t, so that hosts without CUDA headers can include the launchers' declarations.
struct CUstream_st;

namespace vss {

enum class Status : int { ok = 0, bad_argument = 1, launch_failed = 2 };

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

// Storage of the two 16-bit types; arithmetic is always float.
struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float to_float(float value) {
    return value;
}

inline float to_float(BFloat16 value) {
    return bits_to_float(static_cast<uint32_t>(value.bits) << 16);
}

// Moves exponent and fraction in place and rescales by 2^112, which is exact and covers subnormals too.
inline float to_float(Half value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t rest = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
    const uint32_t finite = float_to_bits(bits_to_float(rest) * 0x1p112f);
    const uint32_t bits = rest >= 0x0f800000u ? (rest | 0x70000000u) : finite;
    return bits_to_float(bits | sign);
}

// Calls run(float{}), run(Half{}) or run(BFloat16{}), whichever the maps consist of; for what runs on the CPU.
template <typename Run>
Status by_dtype(DType dtype, const Run& run) {
    switch (dtype) {
        case DType::f32:
            run(float{});
            return Status::ok;
        case DType::f16:
            run(Half{});
            return Status::ok;
        case DType::bf16:
            run(BFloat16{});
            return Status::ok;
    }
    return Status::bad_argument;
}

// Inside an OpenMP region: which thread runs; 0 without OpenMP.
inline int thread_index() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

VSS_HD int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

}  // namespace vss
