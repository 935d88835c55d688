// channel_moments: the CUDA source run on the host, and the CPU kernel, against sums in double.
#include "channel_moments.cu"

#include "maps.h"

namespace {

using namespace vss;
using vss::test::check;
using vss::test::Layout;
using vss::test::Maps;

struct Row {
    vss::test::Sizes sizes;
    bool mask = false;
    Layout layout = Layout::contiguous, gradient = Layout::contiguous;
    DType dtype = DType::f32;
};

const Row kRows[] = {
    {{1, 1, 1, 1}},
    {{2, 3, 5, 7}, true},
    {{1, 2, 140, 133}, true},
    {{3, 5, 1, 300}},
    {{2, 7, 0, 4}},
    {{0, 3, 4, 5}},
    {{2, 37, 9, 11}, true, Layout::channels_last},
    {{1, 16, 40, 31}, false, Layout::channels_last, Layout::channels_last, DType::f16},
    {{2, 18, 16, 17}, true, Layout::channels_last, Layout::transposed, DType::bf16},
    {{2, 5, 28, 29}, true, Layout::strided, Layout::contiguous},
    {{2, 5, 28, 290}, true, Layout::transposed, Layout::strided},
    {{1, 33, 18, 3}, false, Layout::contiguous, Layout::channels_last, DType::f16},
};

// Sums and sums of sizes of map (n, c), by the definition.
MomentSums<double> definition(const Maps& a, const Maps& g, const float* mask, int64_t map, MomentSums<double>& size) {
    const auto [batch, channels, height, width] = a.sizes;
    MomentSums<double> sum{};
    for (int64_t y = 0; y < height; ++y)
        for (int64_t x = 0; x < width; ++x) {
            const double value = a.at(map / channels, map % channels, y, x);
            const double slope = g.at(map / channels, map % channels, y, x);
            const double weight = mask ? mask[(map / channels * height + y) * width + x] : 1.0;
            sum.product += value * slope * weight, sum.abs_product += std::fabs(value * slope) * weight;
            sum.abs_activation += std::fabs(value) * weight, sum.gradient += slope * weight;
            size.product += std::fabs(value * slope * weight), size.gradient += std::fabs(slope * weight);
            size.abs_activation += std::fabs(value * weight);
        }
    size.abs_product = size.product;
    return sum;
}

void run(const Row& row) {
    const Maps a(row.sizes, row.layout, row.dtype, 11), g(row.sizes, row.gradient, row.dtype, 12);
    const std::vector<float> mask =
        vss::test::normal(static_cast<size_t>(row.sizes[0] * row.sizes[2] * row.sizes[3]), 13);
    ChannelMomentsParams p{};
    p.activation = a.data(), p.gradient = g.data(), p.dtype = row.dtype, p.mask = row.mask ? mask.data() : nullptr;
    p.batch = row.sizes[0], p.channels = row.sizes[1], p.height = row.sizes[2], p.width = row.sizes[3];
    std::copy_n(a.stride, 4, p.stride_a);
    std::copy_n(g.stride, 4, p.stride_g);
    p.threads = 2;
    std::vector<float> moments(static_cast<size_t>(p.batch * p.channels * kChannelMoments), NAN), cuda(moments), space;
    space.assign(static_cast<size_t>(std::max(channel_moments_workspace(p), channel_moments_workspace_cuda(p))), NAN);
    p.moments = moments.data(), p.workspace = space.data();
    check(channel_moments_cpu(p) == Status::ok, "status");
    p.moments = cuda.data();
    vss::test::in_every_order(cuda, [&] { return channel_moments_cuda(p, nullptr); });
    for (int64_t map = 0; map < p.batch * p.channels; ++map) {
        MomentSums<double> size{};
        float expected[kChannelMoments], slack[kChannelMoments];
        definition(a, g, p.mask, map, size).store(expected);
        size.store(slack);
        for (int m = 0; m < kChannelMoments; ++m) {
            const auto at = static_cast<size_t>(map * kChannelMoments + m);
            check(std::fabs(moments[at] - expected[m]) <= 3e-6f * slack[m], "CPU moment", map, m);
            check(std::fabs(cuda[at] - expected[m]) <= 3e-6f * slack[m], "CUDA moment", map, m);
        }
    }
}

// Every position is in the share of one thread; maps near 2^31 positions by their number.
void check_plan(int64_t groups, int64_t height, int64_t width, bool channels_last) {
    ChannelMomentsParams p{};
    p.batch = groups, p.channels = channels_last ? 16 : 1, p.height = height, p.width = width;
    p.stride_a[1] = channels_last ? 1 : 1 << 30, p.stride_a[3] = channels_last ? 16 : 1;
    p.stride_a[2] = p.stride_a[3] * width;
    std::copy_n(p.stride_a, 4, p.stride_g);
    const MomentPlan plan = moment_plan(p);
    check(plan.width == (height * width <= kMaxBlocks ? height * width : width), "dense width", height, width);
    int64_t count = 0;
    for (int64_t split = 0; split < plan.splits; ++split)
        for (int thread = 0; thread < plan.step; ++thread) {
            const MomentShare share = moment_share(plan, split, thread);
            check(share.count <= kMomentMostFloats, "positions of a thread", share.count);
            count += share.count;
            if (share.count == 0) continue;
            const int64_t last = share.first + (share.count - 1) * plan.step;
            check(last < plan.positions && last < (split + 1) * plan.share, "a position outside", last);
        }
    check(count == plan.positions, "all positions", count, plan.positions);
}

// Walks over maps of known strides, dense and not, against division.
void check_walk(int64_t height, int64_t width, int64_t stride_h, int64_t stride_w, int64_t first, int64_t step) {
    Walk walk(first, step, width, stride_h, stride_w);
    for (int64_t at = first, count = 0; at < height * width && count < 3000; at += step, ++count) {
        check(walk.offset == at / width * stride_h + at % width * stride_w, "offset of a walk", at, walk.offset);
        walk.next();
    }
}

}  // namespace

int main() {
    for (const Row& row : kRows) run(row);
    for (const bool last : {false, true}) {
        for (const int64_t positions : {1, 7, 8, 9, 255, 256, 257, 4095, 4097, 130001}) {
            check_plan(1, 1, positions, last);
            check_plan(2000, positions, 1, last);
        }
        check_plan(1, 1, kMaxBlocks, false);
        check_plan(1, 46341, 46341, false);
    }
    for (const int64_t width : {1, 2, 3, 31, 256, 1000})
        for (const int64_t step : {1, 8, 256, 700}) {
            for (const int64_t first : {0, 5, 255}) check_walk(200, width, 3 * width + 1, 2, first, step);
            check_walk(kMaxBlocks, width, kMaxBlocks, -3, int64_t{kMaxBlocks} * width - 5000 * step, step);
        }
    check_walk(3, kMaxBlocks, kMaxBlocks, 1, kMaxBlocks - 9, 8);
    check_walk(3, kMaxBlocks, 1, kMaxBlocks, kMaxBlocks - 900000000, 999999999);
    return vss::test::result();
}
