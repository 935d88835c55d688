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

// What a kernel says: all is well, it refuses its arguments, CUDA would not launch it, or CUDA reports what an earlier
// kernel did; the last two with CUDA's own sentence.
struct Status {
    enum Code : int { ok, bad_argument, launch_failed, earlier_failed };

    Code code;
    const char* text;

    Status(Code status, const char* sentence = "") : code(status), text(sentence) {}
    friend bool operator==(const Status& a, const Status& b) { return a.code == b.code; }
    friend bool operator!=(const Status& a, const Status& b) { return a.code != b.code; }
};

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

constexpr int64_t kMaxBlocks = 2147483647;  // of a launch, and the largest int32

// Division of 0..2^31 - 1 by a divisor of 1..2^31 - 1 that is the same for all threads: a high product, an add and a
// shift. The magic number is that of Granlund and Montgomery, "Division by Invariant Integers using Multiplication"
// (PLDI 1994), figure 4.1.
struct FastDiv {
    uint32_t divisor, magic, shift;

    explicit FastDiv(int64_t by) : divisor(static_cast<uint32_t>(by)), shift(0) {
        while ((int64_t{1} << shift) < by) ++shift;
        const auto rest = (uint64_t{1} << shift) - divisor;
        magic = static_cast<uint32_t>((rest << 32) / divisor + 1);
    }

    VSS_HD uint32_t quotient(uint32_t value) const {
#if defined(__CUDA_ARCH__)
        const uint32_t high = __umulhi(value, magic);
#else
        const auto high = static_cast<uint32_t>(uint64_t{value} * magic >> 32);
#endif
        return (high + value) >> shift;
    }

    VSS_HD uint32_t remainder(uint32_t value) const { return value - quotient(value) * divisor; }
};

// A walk over the positions y * width + x of a map, `step` at a time, without a division on the way. One row may stand
// for the whole map (dense_width).
struct Walk {
    uint32_t x, width, step_x;
    int64_t offset, advance, wrap;  // in elements of the map

    VSS_HD Walk(int64_t start, int64_t step, int64_t map_width, int64_t stride_h, int64_t stride_w)
        : x(static_cast<uint32_t>(start % map_width)),
          width(static_cast<uint32_t>(map_width)),
          step_x(static_cast<uint32_t>(step % map_width)),
          offset(start / map_width * stride_h + x * stride_w),
          advance(step / map_width * stride_h + step_x * stride_w),
          wrap(stride_h - map_width * stride_w) {}

    VSS_HD void next() {
        x += step_x;  // below 2 * width, so below 2^32
        offset += advance;
        if (x >= width) x -= width, offset += wrap;
    }
};

// The width of the map seen as rows that follow each other without a gap: all positions, where they do.
VSS_HD int64_t dense_width(int64_t height, int64_t width, int64_t stride_h, int64_t stride_w) {
    const bool dense = height == 1 || stride_h == width * stride_w;
    return dense && height * width <= kMaxBlocks ? height * width : width;
}

}  // namespace vss
