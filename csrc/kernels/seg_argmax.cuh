// Device code of seg_argmax, apart from its launcher so that other kernels can be made of it (plugins_trt).
//
// One block makes a segment of one output row. It lerps the two input rows vertically into shared memory, once per
// class and input column, as many classes at a time as fit; each thread then lerps horizontally for four adjacent
// pixels and keeps their running maxima in registers. Where one input segment would not fit (strong shrinking), the
// threads read the scores directly.
#pragma once

#include "common.cuh"
#include "seg_argmax.h"
#include "seg_argmax_tile.h"

namespace vss {

constexpr int kThreads = kSegment / kPixels;

struct Best {
    float value = 0.0f;
    int index = -1;

    // A NaN beats every number, the first NaN stays, the lowest class wins a tie.
    __device__ __forceinline__ void offer(float candidate, int k) {
        const bool wins = index < 0 || (!(candidate <= value) && value == value);
        value = wins ? candidate : value;
        index = wins ? k : index;
    }
};

// Which output row and columns a block makes, and the taps of one thread's pixels.
struct Tile {
    SegmentAt at;
    Tap row;
    Tap column[kPixels];

    __device__ __forceinline__ explicit Tile(const SegArgmaxParams& p)
        : at(segment_at(blockIdx.x, p)), row(row_tap(p, at.y)) {
#pragma unroll
        for (int j = 0; j < kPixels; ++j) column[j] = column_tap(p, at.first + threadIdx.x * kPixels + j);
    }

    __device__ __forceinline__ void store(const SegArgmaxParams& p, const Best (&best)[kPixels]) const {
        const int64_t x = at.first + threadIdx.x * kPixels, place = (at.n * p.out_h + at.y) * p.out_w + x;
        if (p.wide_labels != nullptr) {
#pragma unroll
            for (int j = 0; j < kPixels; ++j) {
                if (x + j < p.out_w) p.wide_labels[place + j] = best[j].index;
            }
            return;
        }
        uint8_t* out = p.labels + place;
        if (p.out_w % kPixels == 0 && x < p.out_w) {
            *reinterpret_cast<uchar4*>(out) = make_uchar4(best[0].index, best[1].index, best[2].index, best[3].index);
            return;
        }
#pragma unroll
        for (int j = 0; j < kPixels; ++j) {
            if (x + j < p.out_w) out[j] = static_cast<uint8_t>(best[j].index);
        }
    }
};

// stage[k][c] = vertical lerp of class first_class + k at input column low + c. Warps run along the contiguous axis.
template <typename T>
__device__ __forceinline__ void fill_stage(const SegArgmaxParams& p, const T* upper, const T* lower, const Tap& row,
                                           int64_t low, int width, int pitch, int classes, float* stage) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = kThreads / 32;
    const bool class_fastest = p.stride_c == 1 && p.stride_w != 1;
    const int outer = class_fastest ? width : classes, inner = class_fastest ? classes : width;
    for (int i = warp; i < outer; i += warps) {
        for (int j = lane; j < inner; j += 32) {
            const int k = class_fastest ? j : i, c = class_fastest ? i : j;
            const int64_t at = k * p.stride_c + (low + c) * p.stride_w;
            stage[k * pitch + c] = row.w0 * load(upper + at) + row.w1 * load(lower + at);
        }
    }
}

template <typename T>
__device__ __forceinline__ void staged_block(const SegArgmaxParams& p, const T* logits) {
    __shared__ float stage[kStage];
    const Tile tile(p);
    const int low = tile.at.low, width = tile.at.width, pitch = stage_pitch(width);
    const int chunk = kStage / pitch;
    const T* upper = logits + tile.at.n * p.stride_n + tile.row.i0 * p.stride_h;
    const T* lower = logits + tile.at.n * p.stride_n + tile.row.i1 * p.stride_h;
    Best best[kPixels];
    for (int k0 = 0; k0 < p.classes; k0 += chunk) {
        const int classes = p.classes - k0 < chunk ? static_cast<int>(p.classes - k0) : chunk;
        const int64_t skip = k0 * p.stride_c;
        fill_stage(p, upper + skip, lower + skip, tile.row, low, width, pitch, classes, stage);
        __syncthreads();
        for (int k = 0; k < classes; ++k) {
            const float* scores = stage + k * pitch - low;
            float left = 0.0f, right = 0.0f;
#pragma unroll
            for (int j = 0; j < kPixels; ++j) {
                if (j == 0 || tile.column[j].i0 != tile.column[j - 1].i0) {
                    left = scores[tile.column[j].i0];
                    right = scores[tile.column[j].i1];
                }
                best[j].offer(tile.column[j].w0 * left + tile.column[j].w1 * right, k0 + k);
            }
        }
        __syncthreads();
    }
    tile.store(p, best);
}

template <typename T>
__device__ __forceinline__ void direct_block(const SegArgmaxParams& p, const T* logits) {
    const Tile tile(p);
    const T* upper = logits + tile.at.n * p.stride_n + tile.row.i0 * p.stride_h;
    const T* lower = logits + tile.at.n * p.stride_n + tile.row.i1 * p.stride_h;
    Best best[kPixels];
    for (int k = 0; k < p.classes; ++k, upper += p.stride_c, lower += p.stride_c) {
#pragma unroll
        for (int j = 0; j < kPixels; ++j) {
            const Tap& tap = tile.column[j];
            const int64_t a = tap.i0 * p.stride_w, b = tap.i1 * p.stride_w;
            const float top = tap.w0 * load(upper + a) + tap.w1 * load(upper + b);
            const float bottom = tap.w0 * load(lower + a) + tap.w1 * load(lower + b);
            best[j].offer(tile.row.w0 * top + tile.row.w1 * bottom, k);
        }
    }
    tile.store(p, best);
}

}  // namespace vss
