// channel_moments: the CUDA kernel's lanes run on the host with its own functions, against sums in double; the CPU
// kernel on the same inputs.
#include <algorithm>
#include <cmath>

#include "channel_moments_tile.h"
#include "check.h"

namespace {

using namespace vss;
using vss::test::check;

struct Shape {
    int64_t n, c, h, w;
    bool channels_last, mask;
};

const Shape kShapes[] = {{1, 1, 1, 1, false, false}, {2, 3, 5, 7, false, true},    {1, 2, 40, 33, false, true},
                         {2, 37, 9, 11, true, true}, {1, 16, 20, 31, true, false}, {3, 5, 1, 300, false, false}};

struct Problem {
    std::vector<float> a, g, mask, moments, workspace;
    ChannelMomentsParams p{};

    explicit Problem(const Shape& s)
        : a(vss::test::normal(static_cast<size_t>(s.n * s.c * s.h * s.w), 11)),
          g(vss::test::normal(a.size(), 12)),
          mask(vss::test::normal(static_cast<size_t>(s.n * s.h * s.w), 13)),
          moments(static_cast<size_t>(s.n * s.c * kChannelMoments)) {
        p.activation = a.data(), p.gradient = g.data(), p.mask = s.mask ? mask.data() : nullptr;
        p.moments = moments.data();
        p.batch = s.n, p.channels = s.c, p.height = s.h, p.width = s.w;
        const int64_t last[4] = {s.c * s.h * s.w, 1, s.w * s.c, s.c}, first[4] = {s.c * s.h * s.w, s.h * s.w, s.w, 1};
        std::copy_n(s.channels_last ? last : first, 4, p.stride_a);
        std::copy_n(first, 4, p.stride_g);
        p.threads = 2;
        workspace.resize(static_cast<size_t>(channel_moments_workspace(p)));
        p.workspace = workspace.data();
    }
};

// Sums and sums of sizes of map (n, c), by the definition.
MomentSums<double> definition(const Problem& problem, int64_t n, int64_t c, MomentSums<double>& size) {
    const ChannelMomentsParams& p = problem.p;
    MomentSums<double> sum{};
    for (int64_t y = 0; y < p.height; ++y)
        for (int64_t x = 0; x < p.width; ++x) {
            const auto at = [&](const int64_t* s) {
                return static_cast<size_t>(n * s[0] + c * s[1] + y * s[2] + x * s[3]);
            };
            const double value = problem.a[at(p.stride_a)], slope = problem.g[at(p.stride_g)];
            const double weight = p.mask ? p.mask[(n * p.height + y) * p.width + x] : 1.0;
            sum.product += value * slope * weight, sum.abs_product += std::fabs(value * slope) * weight;
            sum.abs_activation += std::fabs(value) * weight, sum.gradient += slope * weight;
            size.product += std::fabs(value * slope * weight), size.gradient += std::fabs(slope * weight);
            size.abs_activation += std::fabs(value * weight);
        }
    size.abs_product = size.product;
    return sum;
}

MomentSums<double> emulate(const Problem& problem, int64_t n, int64_t c, std::vector<int>& visits) {
    const ChannelMomentsParams& p = problem.p;
    const int64_t positions = p.height * p.width;
    std::vector<MomentSums<float>> parts(kMomentThreads);
    const auto visit = [&](int64_t at, MomentSums<float>& sums) {
        const float weight = p.mask ? p.mask[n * positions + at] : 1.0f;
        add_moment(sums, problem.a[static_cast<size_t>(moment_offset(p.stride_a, n, c, at, p.width))],
                   problem.g[static_cast<size_t>(moment_offset(p.stride_g, n, c, at, p.width))], weight);
        ++visits[static_cast<size_t>(at)];
    };
    if (moments_by_channel(p)) {
        const int lane = static_cast<int>(c % 32);
        for (int warp = 0; warp < kMomentWarps; ++warp)
            for (int64_t at = warp; at < positions; at += kMomentWarps)
                visit(at, parts[static_cast<size_t>(warp * 32 + lane)]);
        return lane_total(parts.data(), lane);
    }
    for (int thread = 0; thread < kMomentThreads; ++thread)
        for (int64_t at = thread; at < positions; at += kMomentThreads) visit(at, parts[static_cast<size_t>(thread)]);
    MomentSums<double> sum{};
    for (int lane = 0; lane < 32; ++lane) {
        const MomentSums<double> part = lane_total(parts.data(), lane);
        sum.product += part.product, sum.abs_product += part.abs_product;
        sum.abs_activation += part.abs_activation, sum.gradient += part.gradient;
    }
    return sum;
}

void run(const Shape& s) {
    Problem problem(s);
    check(channel_moments_cpu(problem.p) == Status::ok, "status");
    for (int64_t map = 0; map < s.n * s.c; ++map) {
        MomentSums<double> size{};
        std::vector<int> visits(static_cast<size_t>(s.h * s.w), 0);
        float expected[kChannelMoments], emulated[kChannelMoments], slack[kChannelMoments];
        definition(problem, map / s.c, map % s.c, size).store(expected);
        emulate(problem, map / s.c, map % s.c, visits).store(emulated);
        size.store(slack);
        for (int m = 0; m < kChannelMoments; ++m) {
            const float* got = problem.moments.data() + map * kChannelMoments;
            check(std::fabs(emulated[m] - expected[m]) <= 1e-5f * slack[m], "emulated CUDA moment", map, m);
            check(std::fabs(got[m] - expected[m]) <= 1e-5f * slack[m], "CPU moment", map, m);
        }
        for (const int count : visits) check(count == 1, "position not visited once", map, count);
    }
}

}  // namespace

int main() {
    for (const Shape& shape : kShapes) run(shape);
    return vss::test::result();
}
