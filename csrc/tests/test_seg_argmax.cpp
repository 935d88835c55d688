// seg_argmax against a plain double computation: the CPU kernel, and the CUDA kernel's index arithmetic run on the host
// block by block and thread by thread (it shares seg_argmax_tile.h and resize.h with the real one).
#include <algorithm>
#include <cmath>

#include "check.h"
#include "seg_argmax.h"
#include "seg_argmax_tile.h"

namespace {

using namespace vss;
using vss::test::check;

struct Shape {
    int64_t n, k, h, w, out_h, out_w;
    bool align_corners;
};

const Shape kShapes[] = {
    {1, 1, 1, 1, 1, 1, false},      {2, 3, 5, 7, 40, 56, false},   {1, 19, 16, 32, 128, 1100, false},
    {1, 5, 9, 13, 9, 13, false},    {2, 4, 33, 65, 8, 9, false},   {1, 3, 1, 9, 7, 600, false},
    {1, 2, 3, 9000, 4, 513, false}, {1, 7, 12, 20, 37, 515, true}, {1, 256, 4, 6, 11, 130, true},
    {1, 3, 5, 4, 1, 1, true},       {1, 2, 2, 9000, 3, 700, true}, {1, 9, 6, 1500, 7, 600, false},
};

double source(int64_t at, int64_t in, int64_t out, bool align_corners) {
    if (align_corners) return out > 1 ? static_cast<double>(at) * (in - 1) / (out - 1) : 0.0;
    return std::max(0.0, (at + 0.5) * in / out - 0.5);
}

// Score of class k at an output pixel, all in double.
double score(const Shape& s, const std::vector<float>& x, int64_t n, int64_t k, int64_t y, int64_t column) {
    const double sy = source(y, s.h, s.out_h, s.align_corners), sx = source(column, s.w, s.out_w, s.align_corners);
    const auto y0 = std::min<int64_t>(static_cast<int64_t>(sy), s.h - 1), y1 = std::min(y0 + 1, s.h - 1);
    const auto x0 = std::min<int64_t>(static_cast<int64_t>(sx), s.w - 1), x1 = std::min(x0 + 1, s.w - 1);
    const double fy = std::min(sy - y0, 1.0), fx = std::min(sx - x0, 1.0);
    const float* plane = x.data() + (n * s.k + k) * s.h * s.w;
    const auto value = [&](int64_t a, int64_t b) { return static_cast<double>(plane[a * s.w + b]); };
    return (1 - fy) * ((1 - fx) * value(y0, x0) + fx * value(y0, x1)) +
           fy * ((1 - fx) * value(y1, x0) + fx * value(y1, x1));
}

// A label is right when no class scores higher by more than float rounding of the coordinates allows.
void check_labels(const Shape& s, const std::vector<float>& x, const std::vector<uint8_t>& labels, const char* what) {
    const double tolerance = 1e-5 * static_cast<double>(std::max({s.h, s.w, int64_t{16}}));
    for (int64_t n = 0; n < s.n; ++n)
        for (int64_t y = 0; y < s.out_h; ++y)
            for (int64_t c = 0; c < s.out_w; ++c) {
                double best = -INFINITY;
                for (int64_t k = 0; k < s.k; ++k) best = std::max(best, score(s, x, n, k, y, c));
                const int64_t label = labels[static_cast<size_t>((n * s.out_h + y) * s.out_w + c)];
                check(label < s.k, what, y, c);
                if (label < s.k) check(score(s, x, n, label, y, c) >= best - tolerance, what, y, c);
            }
}

// What the staged CUDA kernel does, with its own functions; the stage is checked to fit and every pixel to be hit once.
void emulate_cuda(const SegArgmaxParams& p, const float* x, std::vector<int>& hits) {
    const bool fits = stage_pitch(widest_segment(p)) <= kStage;
    for (int64_t block = 0; block < segment_count(p); ++block) {
        const SegmentAt at = segment_at(block, p);
        const Tap row = row_tap(p, at.y);
        check(at.width <= widest_segment(p), "a segment is wider than the bound", at.width, widest_segment(p));
        check(!fits || kStage / stage_pitch(at.width) >= 1, "a staged segment does not fit", at.width, 0);
        for (int64_t thread = 0; thread < kSegment / kPixels; ++thread)
            for (int64_t j = 0; j < kPixels; ++j) {
                const int64_t column = at.first + thread * kPixels + j;
                const Tap tap = column_tap(p, column);
                check(tap.i0 >= at.low && tap.i1 < at.low + at.width, "a tap leaves its stage", tap.i0, at.low);
                if (column >= p.out_w) continue;
                float best = 0.0f;
                int index = -1;
                for (int k = 0; k < p.classes; ++k) {
                    const float* plane = x + at.n * p.stride_n + k * p.stride_c;
                    const float *upper = plane + row.i0 * p.stride_h, *lower = plane + row.i1 * p.stride_h;
                    const float left = row.w0 * upper[tap.i0] + row.w1 * lower[tap.i0];
                    const float right = row.w0 * upper[tap.i1] + row.w1 * lower[tap.i1];
                    const float value = tap.w0 * left + tap.w1 * right;
                    if (index >= 0 && !(value > best)) continue;
                    best = value;
                    index = k;
                }
                const auto pixel = static_cast<size_t>((at.n * p.out_h + at.y) * p.out_w + column);
                p.labels[pixel] = static_cast<uint8_t>(index);
                ++hits[pixel];
            }
    }
}

void run(const Shape& s) {
    const std::vector<float> x = vss::test::normal(static_cast<size_t>(s.n * s.k * s.h * s.w), 7);
    std::vector<uint8_t> labels(static_cast<size_t>(s.n * s.out_h * s.out_w), 255);
    SegArgmaxParams p{};
    p.logits = x.data();
    p.batch = s.n, p.classes = s.k, p.in_h = s.h, p.in_w = s.w, p.out_h = s.out_h, p.out_w = s.out_w;
    p.stride_n = s.k * s.h * s.w, p.stride_c = s.h * s.w, p.stride_h = s.w, p.stride_w = 1;
    p.align_corners = s.align_corners;
    p.labels = labels.data();
    p.threads = 2;
    std::vector<float> workspace(static_cast<size_t>(seg_argmax_workspace(p)));
    p.workspace = workspace.data();
    check(seg_argmax_cpu(p) == Status::ok, "status");
    check_labels(s, x, labels, "CPU label");
    std::vector<int32_t> wide(labels.size(), -1);
    p.wide_labels = wide.data();
    check(seg_argmax_cpu(p) == Status::ok, "CPU status, int32 labels");
    check(std::equal(labels.begin(), labels.end(), wide.begin()), "int32 labels are the same");
    p.wide_labels = nullptr;
    std::vector<int> hits(labels.size(), 0);
    emulate_cuda(p, x.data(), hits);
    check_labels(s, x, labels, "emulated CUDA label");
    for (size_t i = 0; i < hits.size(); ++i) check(hits[i] == 1, "pixel not written once", static_cast<long long>(i));
}

}  // namespace

int main() {
    for (const Shape& shape : kShapes) run(shape);
    SegArgmaxParams bad{};
    bad.classes = 257, bad.threads = 1;
    check(seg_argmax_cpu(bad) == Status::bad_argument, "257 classes are refused");
    return vss::test::result();
}
