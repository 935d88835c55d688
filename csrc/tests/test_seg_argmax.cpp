// seg_argmax against a plain double computation: the CUDA source run on the host, and the CPU kernel.
#include "seg_argmax.cu"

#include "maps.h"

namespace {

using namespace vss;
using vss::test::check;
using vss::test::Layout;
using vss::test::Maps;

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

// Labels of the CUDA source in three orders of threads, as uint8 or as int32.
std::vector<uint8_t> labels_of_cuda(SegArgmaxParams p, bool wide) {
    const auto count = static_cast<size_t>(p.batch * p.out_h * p.out_w);
    std::vector<uint8_t> first;
    for (const auto each : {vss::test::Order::up, vss::test::Order::down, vss::test::Order::shuffled}) {
        vss::test::order = each;
        std::vector<uint8_t> labels(count, 255);
        std::vector<int32_t> wide_labels(wide ? count : 0, -1);
        p.labels = labels.data(), p.wide_labels = wide ? wide_labels.data() : nullptr;
        check(seg_argmax_cuda(p, nullptr) == Status::ok, "CUDA status");
        if (wide) std::copy(wide_labels.begin(), wide_labels.end(), labels.begin());
        if (first.empty()) first = labels;
        check(labels == first, "the order of threads changes the labels", static_cast<int>(each));
    }
    return first;
}

// The segments of all blocks are the labels, each once, and taps stay within their stage.
void check_blocks(const SegArgmaxParams& p) {
    const SegPlan plan = seg_plan(p);
    std::vector<int> hits(static_cast<size_t>(p.batch * p.out_h * p.out_w));
    for (int64_t block = 0; block < seg_blocks(p, plan); ++block) {
        const SegmentAt at = segment_at(static_cast<uint32_t>(block), p, plan);
        check(at.width <= widest_segment(p, plan.scale_w), "a segment is wider than the bound", at.width);
        for (int64_t y = at.y; y < at.y_end; ++y)
            for (int64_t x = at.first; x <= at.last; ++x) {
                const Tap tap = column_tap(p, plan, x);
                check(tap.i0 >= at.low && tap.i1 < at.low + at.width, "a tap leaves its stage", tap.i0, at.low);
                ++hits[static_cast<size_t>((at.n * p.out_h + y) * p.out_w + x)];
            }
        int64_t y = at.y;
        for (RowRun run; y < at.y_end; y += run.count) {
            run = row_run(p, plan, y, at.y_end);
            check(run.count >= 1 && y + run.count <= at.y_end, "a run of rows", y, run.count);
            for (int r = 0; r < run.count; ++r) {
                const Tap tap = row_tap(p, plan, y + r);
                check(tap.i0 == run.i0 && tap.i1 == run.i1 && tap.w1 == run.w1[r], "rows of a run", y, r);
            }
            if (run.count == 0) return;
        }
    }
    for (const int count : hits) check(count == 1, "a label is in one segment", count);
}

void run(const Shape& s, Layout layout, DType dtype) {
    const Maps maps({s.n, s.k, s.h, s.w}, layout, dtype, 7);
    std::vector<uint8_t> labels(static_cast<size_t>(s.n * s.out_h * s.out_w), 255);
    SegArgmaxParams p{};
    p.logits = maps.data(), p.dtype = dtype;
    p.batch = s.n, p.classes = s.k, p.in_h = s.h, p.in_w = s.w, p.out_h = s.out_h, p.out_w = s.out_w;
    p.stride_n = maps.stride[0], p.stride_c = maps.stride[1], p.stride_h = maps.stride[2], p.stride_w = maps.stride[3];
    p.align_corners = s.align_corners;
    p.labels = labels.data();
    p.threads = 2;
    std::vector<float> workspace(static_cast<size_t>(seg_argmax_workspace(p)));
    p.workspace = workspace.data();
    check(seg_argmax_cpu(p) == Status::ok, "status");
    check_labels(s, maps.values, labels, "CPU label");
    std::vector<int32_t> wide(labels.size(), -1);
    p.wide_labels = wide.data();
    check(seg_argmax_cpu(p) == Status::ok, "CPU status, int32 labels");
    check(std::equal(labels.begin(), labels.end(), wide.begin()), "int32 labels are the same");
    p.wide_labels = nullptr;
    check_blocks(p);
    const std::vector<uint8_t> cuda = labels_of_cuda(p, false);
    check_labels(s, maps.values, cuda, "CUDA label");
    check(cuda == labels_of_cuda(p, true), "int32 labels of CUDA are the same");
}

// At the same size nothing is rounded: ties and NaN fall alike on both.
void check_ties() {
    Maps maps({2, 30, 9, 131}, Layout::contiguous, DType::f32, 8);
    for (float& value : maps.values) value = std::round(value);
    for (size_t i = 0; i < maps.values.size(); i += 211) maps.values[i] = std::nanf("");
    maps.store();
    std::vector<uint8_t> labels(2 * 9 * 131);
    SegArgmaxParams p{};
    p.logits = maps.data(), p.labels = labels.data();
    p.batch = 2, p.classes = 30, p.in_h = p.out_h = 9, p.in_w = p.out_w = 131, p.threads = 1;
    p.stride_n = maps.stride[0], p.stride_c = maps.stride[1], p.stride_h = maps.stride[2], p.stride_w = maps.stride[3];
    std::vector<float> workspace(static_cast<size_t>(seg_argmax_workspace(p)));
    p.workspace = workspace.data();
    check(seg_argmax_cpu(p) == Status::ok, "status");
    check(labels == labels_of_cuda(p, false), "ties and NaN");
}

// Blocks near the end of the largest launches.
void check_large(int64_t batch, int64_t out_h, int64_t out_w) {
    SegArgmaxParams p{};
    p.batch = batch, p.classes = 2, p.in_h = 7, p.in_w = 9, p.out_h = out_h, p.out_w = out_w;
    const SegPlan plan = seg_plan(p);
    const int64_t blocks = seg_blocks(p, plan);
    check(blocks <= kMaxBlocks, "blocks", blocks);
    const SegmentAt at = segment_at(static_cast<uint32_t>(blocks - 1), p, plan);
    check(at.n == batch - 1 && at.y_end == out_h && at.last == out_w - 1, "the last block", batch, out_h);
    check(at.y >= 0 && at.y < at.y_end && at.first >= 0 && at.first <= at.last && at.width >= 1, "the last block",
          out_w);
}

}  // namespace

int main() {
    const Layout layouts[] = {Layout::contiguous, Layout::channels_last, Layout::strided, Layout::transposed};
    const DType dtypes[] = {DType::f32, DType::f16, DType::bf16};
    int number = 0;
    for (const Shape& shape : kShapes) {
        run(shape, Layout::contiguous, DType::f32);
        run(shape, layouts[number % 4], dtypes[number % 3]);
        ++number;
    }
    check_ties();
    check_large(1, kMaxBlocks, 1);
    check_large(3, 5, kMaxBlocks);
    check_large(65536, 65536, 512);
    SegArgmaxParams bad{};
    bad.classes = 257, bad.threads = 1;
    check(seg_argmax_cpu(bad) == Status::bad_argument, "257 classes are refused");
    check(seg_argmax_cuda(bad, nullptr) == Status::bad_argument, "257 classes are refused by CUDA");
    return vss::test::result();
}
