// Device code of seg_argmax, apart from its launcher so that other kernels can be made of it (plugins_trt).
//
// One block makes a segment of four output rows. Those that read the same two input rows are made together: the two
// rows are brought into shared memory once, as many classes at a time as fit; each thread lerps them horizontally for
// four adjacent pixels, then vertically for each output row, and keeps the running maxima in registers. Where the input
// columns of a segment would not fit (strong shrinking), the threads read the scores directly.
#pragma once

#include "common.cuh"
#include "seg_argmax.h"
#include "seg_argmax_tile.h"

namespace vss {

constexpr int kThreads = kSegment / kPixels;

struct Best {
    float value = -INFINITY;
    int index = 0;

    // A NaN beats every number, the first NaN stays, the lowest class wins a tie.
    __device__ __forceinline__ void offer(float candidate, int k) {
        const bool wins = !(candidate <= value) && value == value;
        value = wins ? candidate : value;
        index = wins ? k : index;
    }
};

// Which output rows and columns a block makes, and the taps of one thread's pixels.
struct Tile {
    SegmentAt at;
    Tap column[kPixels];

    __device__ __forceinline__ Tile(const SegArgmaxParams& p, const SegPlan& plan)
        : at(segment_at(blockIdx.x, p, plan)) {
#pragma unroll
        for (int j = 0; j < kPixels; ++j) column[j] = column_tap(p, plan, at.first + threadIdx.x * kPixels + j);
    }

    __device__ __forceinline__ void store(const SegArgmaxParams& p, const SegPlan& plan, int64_t y,
                                          const Best (&best)[kPixels]) const {
        const int64_t x = at.first + threadIdx.x * kPixels, place = (at.n * p.out_h + y) * p.out_w + x;
        if (x >= p.out_w) return;
        if (plan.vectors && p.wide_labels != nullptr) {
            *reinterpret_cast<int4*>(p.wide_labels + place) =
                make_int4(best[0].index, best[1].index, best[2].index, best[3].index);
            return;
        }
        if (plan.vectors) {
            *reinterpret_cast<uchar4*>(p.labels + place) =
                make_uchar4(best[0].index, best[1].index, best[2].index, best[3].index);
            return;
        }
#pragma unroll
        for (int j = 0; j < kPixels; ++j) {
            if (x + j >= p.out_w) break;
            if (p.wide_labels != nullptr) {
                p.wide_labels[place + j] = best[j].index;
            } else {
                p.labels[place + j] = static_cast<uint8_t>(best[j].index);
            }
        }
    }
};

// stage[side][k][c] = class k of the upper or lower input row at column c. Warps run along the contiguous axis.
template <typename T>
__device__ __forceinline__ void fill_stage(const SegArgmaxParams& p, const T* upper, const T* lower, int width,
                                           int pitch, int classes, float* stage, float* stage_lower) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = kThreads / 32;
    const bool class_fastest = p.stride_c == 1 && p.stride_w != 1;
    const int outer = class_fastest ? width : classes, inner = class_fastest ? classes : width;
    const int64_t outer_step = class_fastest ? p.stride_w : p.stride_c,
                  inner_step = class_fastest ? p.stride_c : p.stride_w;
    const int outer_pitch = class_fastest ? 1 : pitch, inner_pitch = class_fastest ? pitch : 1;
    for (int i = warp; i < outer; i += warps) {
        for (int j = lane; j < inner; j += 32) {
            const int64_t at = i * outer_step + j * inner_step;
            const int to = i * outer_pitch + j * inner_pitch;
            stage[to] = load(upper + at);
            stage_lower[to] = load(lower + at);
        }
    }
}

template <typename T>
__device__ __forceinline__ void staged_block(const SegArgmaxParams& p, const SegPlan& plan, const T* logits) {
    __shared__ float stage[kStage];
    const Tile tile(p, plan);
    const int low = tile.at.low, width = tile.at.width, pitch = stage_pitch(width);
    const int chunk = kStage / (2 * pitch);
    float* stage_lower = stage + chunk * pitch;
    const T* image = logits + tile.at.n * p.stride_n + low * p.stride_w;
    for (int64_t y = tile.at.y; y < tile.at.y_end;) {
        const RowRun run = row_run(p, plan, y, tile.at.y_end);
        Best best[kBand][kPixels];
        for (int k0 = 0; k0 < p.classes; k0 += chunk) {
            const int classes = p.classes - k0 < chunk ? static_cast<int>(p.classes - k0) : chunk;
            const T* plane = image + k0 * p.stride_c;
            fill_stage(p, plane + run.i0 * p.stride_h, plane + run.i1 * p.stride_h, width, pitch, classes, stage,
                       stage_lower);
            __syncthreads();
            for (int k = 0; k < classes; ++k) {
                const int row = k * pitch - low;
                float left[2] = {}, right[2] = {};
#pragma unroll
                for (int j = 0; j < kPixels; ++j) {
                    const Tap& tap = tile.column[j];
                    if (j == 0 || tap.i0 != tile.column[j - 1].i0) {
                        left[0] = stage[row + tap.i0], right[0] = stage[row + tap.i1];
                        left[1] = stage_lower[row + tap.i0], right[1] = stage_lower[row + tap.i1];
                    }
                    const float top = tap.w0 * left[0] + tap.w1 * right[0];
                    const float bottom = tap.w0 * left[1] + tap.w1 * right[1];
#pragma unroll
                    for (int r = 0; r < kBand; ++r) {
                        if (r < run.count) best[r][j].offer(run.w0[r] * top + run.w1[r] * bottom, k0 + k);
                    }
                }
            }
            __syncthreads();
        }
#pragma unroll
        for (int r = 0; r < kBand; ++r) {
            if (r < run.count) tile.store(p, plan, y + r, best[r]);
        }
        y += run.count;
    }
}

template <typename T>
__device__ __forceinline__ void direct_block(const SegArgmaxParams& p, const SegPlan& plan, const T* logits) {
    const Tile tile(p, plan);
    for (int64_t y = tile.at.y; y < tile.at.y_end; ++y) {
        const Tap row = row_tap(p, plan, y);
        const T* upper = logits + tile.at.n * p.stride_n + row.i0 * p.stride_h;
        const T* lower = logits + tile.at.n * p.stride_n + row.i1 * p.stride_h;
        Best best[kPixels];
        for (int k = 0; k < p.classes; ++k, upper += p.stride_c, lower += p.stride_c) {
#pragma unroll
            for (int j = 0; j < kPixels; ++j) {
                const Tap& tap = tile.column[j];
                const int64_t a = tap.i0 * p.stride_w, b = tap.i1 * p.stride_w;
                const float top = tap.w0 * load(upper + a) + tap.w1 * load(upper + b);
                const float bottom = tap.w0 * load(lower + a) + tap.w1 * load(lower + b);
                best[j].offer(row.w0 * top + row.w1 * bottom, k);
            }
        }
        tile.store(p, plan, y, best);
    }
}

}  // namespace vss
