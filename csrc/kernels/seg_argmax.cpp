// CPU: the output is cut into bands of rows by blocks of columns. For one block, the two input rows around an output
// row are stretched to the block's columns once per class and kept (they serve every output row between them); each
// output row is then a lerp of two short rows and a running maximum over classes, all in the first-level cache.
#include "seg_argmax.h"

#include <algorithm>

#include "resize.h"

namespace vss {
namespace {

constexpr int kColumns = 128;  // columns of a block; two rows of 19 classes are 19 KiB
constexpr int kRows = 64;      // output rows of a band

// One step of the running maximum over `Classes` further classes, the first of them number `k`.
template <int Classes>
inline __attribute__((always_inline)) void argmax_step(const float* __restrict top, const float* __restrict bottom,
                                                       float h0, float h1, int k, float* __restrict best,
                                                       int32_t* __restrict index) {
    for (int x = 0; x < kColumns; ++x) {
        float leader = best[x];
        int32_t leader_index = index[x];
        for (int u = 0; u < Classes; ++u) {
            const float value = h0 * top[u * kColumns + x] + h1 * bottom[u * kColumns + x];
            leader_index = value > leader ? k + u : leader_index;
            leader = value > leader ? value : leader;
        }
        best[x] = leader;
        index[x] = leader_index;
    }
}

// labels[x] = argmax over k of h0 * top[k][x] + h1 * bottom[k][x], for kColumns columns of finite values.
VSS_CLONES void argmax_finite(const float* __restrict top, const float* __restrict bottom, float h0, float h1,
                              int classes, uint8_t* __restrict labels) {
    constexpr int kUnroll = 4;
    alignas(64) float best[kColumns];
    alignas(64) int32_t index[kColumns];
    for (int x = 0; x < kColumns; ++x) {
        best[x] = h0 * top[x] + h1 * bottom[x];
        index[x] = 0;
    }
    int k = 1;
    for (; k + kUnroll <= classes; k += kUnroll) {
        argmax_step<kUnroll>(top + k * kColumns, bottom + k * kColumns, h0, h1, k, best, index);
    }
    for (; k < classes; ++k) argmax_step<1>(top + k * kColumns, bottom + k * kColumns, h0, h1, k, best, index);
    for (int x = 0; x < kColumns; ++x) labels[x] = static_cast<uint8_t>(index[x]);
}

// The same for rows that hold an infinity or a NaN: a NaN beats every number, and the first NaN stays.
void argmax_special(const float* top, const float* bottom, float h0, float h1, int classes, uint8_t* labels) {
    for (int x = 0; x < kColumns; ++x) {
        float best = h0 * top[x] + h1 * bottom[x];
        int index = 0;
        for (int k = 1; k < classes && best == best; ++k) {
            const float value = h0 * top[k * kColumns + x] + h1 * bottom[k * kColumns + x];
            if (value <= best) continue;
            best = value;
            index = k;
        }
        labels[x] = static_cast<uint8_t>(index);
    }
}

VSS_CLONES bool all_finite(const float* values, int64_t count) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t magnitude = float_to_bits(values[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest < 0x7f800000u;
}

// The column taps of one block; columns past the image repeat the last one.
struct ColumnTaps {
    int64_t offset0[kColumns], offset1[kColumns];
    float w0[kColumns], w1[kColumns];

    ColumnTaps(const SegArgmaxParams& p, int64_t first, float scale) {
        for (int j = 0; j < kColumns; ++j) {
            const auto x = static_cast<int32_t>(std::min(first + j, p.out_w - 1));
            const Tap tap =
                resize_tap(x, static_cast<int32_t>(p.in_w), static_cast<int32_t>(p.out_w), scale, p.align_corners);
            offset0[j] = tap.i0 * p.stride_w;
            offset1[j] = tap.i1 * p.stride_w;
            w0[j] = tap.w0;
            w1[j] = tap.w1;
        }
    }
};

// values[k][j] = input row `y` of class k at the block's columns. Returns whether all of them are finite.
template <typename T>
bool stretch_row(const SegArgmaxParams& p, const ColumnTaps& taps, int64_t n, int64_t y, float* values) {
    const T* plane = static_cast<const T*>(p.logits) + n * p.stride_n + y * p.stride_h;
    for (int64_t k = 0; k < p.classes; ++k, plane += p.stride_c) {
        float* row = values + k * kColumns;
        for (int j = 0; j < kColumns; ++j) {
            row[j] = taps.w0[j] * to_float(plane[taps.offset0[j]]) + taps.w1[j] * to_float(plane[taps.offset1[j]]);
        }
    }
    return all_finite(values, p.classes * kColumns);
}

struct StretchedRow {
    float* values;
    int64_t y = -1;
    bool finite = true;
};

// The two stretched rows around an output row. A step down the image reuses the lower one as the upper one.
template <typename T>
struct RowPair {
    const SegArgmaxParams& p;
    const ColumnTaps& taps;
    int64_t n;
    StretchedRow upper, lower;

    void move_to(const Tap& tap) {
        if (upper.y != tap.i0 && lower.y == tap.i0) std::swap(upper, lower);
        fill(upper, tap.i0);
        if (tap.i1 != tap.i0) fill(lower, tap.i1);
    }

    void fill(StretchedRow& row, int64_t y) const {
        if (row.y == y) return;
        row.finite = stretch_row<T>(p, taps, n, y, row.values);
        row.y = y;
    }
};

template <typename T>
void block(const SegArgmaxParams& p, int64_t n, int64_t first_row, int64_t first_column, float* buffer) {
    const float scale_h = resize_scale(p.in_h, p.out_h, p.align_corners);
    const ColumnTaps taps(p, first_column, resize_scale(p.in_w, p.out_w, p.align_corners));
    RowPair<T> pair{p, taps, n, {buffer}, {buffer + p.classes * kColumns}};
    const int64_t last_row = std::min(first_row + kRows, p.out_h);
    const auto columns = static_cast<size_t>(std::min<int64_t>(kColumns, p.out_w - first_column));
    for (int64_t y = first_row; y < last_row; ++y) {
        const Tap tap = resize_tap(static_cast<int32_t>(y), static_cast<int32_t>(p.in_h), static_cast<int32_t>(p.out_h),
                                   scale_h, p.align_corners);
        pair.move_to(tap);
        const StretchedRow& lower = tap.i1 == tap.i0 ? pair.upper : pair.lower;
        const auto argmax = pair.upper.finite && lower.finite ? argmax_finite : argmax_special;
        uint8_t labels[kColumns];
        argmax(pair.upper.values, lower.values, tap.w0, tap.w1, static_cast<int>(p.classes), labels);
        const int64_t at = (n * p.out_h + y) * p.out_w + first_column;
        if (p.wide_labels != nullptr) {
            std::copy_n(labels, columns, p.wide_labels + at);
        } else {
            std::memcpy(p.labels + at, labels, columns);
        }
    }
}

template <typename T>
void run(const SegArgmaxParams& p) {
    const int64_t bands = ceil_div(p.out_h, kRows), blocks = ceil_div(p.out_w, kColumns);
    const int64_t tasks = p.batch * bands * blocks;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1 && tasks > 1)
    {
        float* buffer = p.workspace + thread_index() * 2 * p.classes * kColumns;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t n = task / (bands * blocks), rest = task % (bands * blocks);
            block<T>(p, n, rest / blocks * kRows, rest % blocks * kColumns, buffer);
        }
    }
}

}  // namespace

int64_t seg_argmax_workspace(const SegArgmaxParams& p) {
    return p.threads * 2 * p.classes * kColumns;
}

Status seg_argmax_cpu(const SegArgmaxParams& p) {
    if (p.classes < 1 || p.classes > kSegArgmaxMaxClasses || p.threads < 1) return Status::bad_argument;
    return by_dtype(p.dtype, [&](auto element) { run<decltype(element)>(p); });
}

}  // namespace vss
