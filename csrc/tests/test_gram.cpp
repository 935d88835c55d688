// gram: the CUDA kernel's plan, tiles and fetches run on the host with its own functions, against the definition in
// double; the CPU kernel on the same inputs.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "gram_tile.h"

namespace {

using namespace vss;
using vss::test::check;

struct Shape {
    int64_t n, c, h, w;
    bool channels_last;
};

const Shape kShapes[] = {
    {1, 1, 1, 1, false},  {2, 7, 3, 5, false},    {3, 65, 1, 1, false},
    {2, 70, 9, 11, true}, {1, 130, 5, 33, false}, {5, 64, 8, 8, true},
};

struct Problem {
    std::vector<float> x, norms, means, workspace, total;
    GramParams p{};

    explicit Problem(const Shape& s)
        : x(vss::test::normal(static_cast<size_t>(s.n * s.c * s.h * s.w), 5)),
          norms(static_cast<size_t>(s.n * s.c)),
          means(vss::test::normal(static_cast<size_t>(s.c), 6)),
          total(static_cast<size_t>(s.c * s.c), 0.5f) {
        for (size_t i = 0; i < norms.size(); ++i) norms[i] = 1.0f + static_cast<float>(i % 5);
        p.maps = x.data(), p.norms = norms.data(), p.means = means.data(), p.total = total.data();
        p.batch = s.n, p.channels = s.c, p.height = s.h, p.width = s.w;
        p.stride_n = s.c * s.h * s.w;
        p.stride_c = s.channels_last ? 1 : s.h * s.w;
        p.stride_h = s.channels_last ? s.w * s.c : s.w;
        p.stride_w = s.channels_last ? s.c : 1;
        p.threads = 2;
    }

    double value(int64_t n, int64_t c, int64_t position) const {
        const int64_t y = position / p.width, column = position % p.width;
        const float raw =
            x[static_cast<size_t>(n * p.stride_n + c * p.stride_c + y * p.stride_h + column * p.stride_w)];
        return (raw - means[static_cast<size_t>(c)]) / norms[static_cast<size_t>(n * p.channels + c)];
    }

    double expected(int64_t i, int64_t j) const {
        double sum = 0.5;
        for (int64_t n = 0; n < p.batch; ++n)
            for (int64_t at = 0; at < p.height * p.width; ++at) sum += value(n, i, at) * value(n, j, at);
        return sum;
    }
};

// One panel of one step as the block's threads fetch it; every slot must be written once.
std::vector<float> fetch(const Problem& problem, int64_t n, int64_t first, int panel) {
    const GramParams& p = problem.p;
    std::vector<float> rows(size_t{kGramTile} * kGramPitch, 0.0f);
    std::vector<int> writes(rows.size(), 0);
    for (int at = 0; at < kGramTile * kGramDepth; ++at) {
        const GramElement element = gram_element(p, n, first, panel, at);
        const auto slot = static_cast<size_t>(element.slot);
        ++writes[slot];
        if (element.offset < 0) continue;
        const auto channel = static_cast<size_t>(element.channel);
        rows[slot] = (problem.x[static_cast<size_t>(element.offset)] - problem.means[channel]) /
                     problem.norms[static_cast<size_t>(n * p.channels) + channel];
    }
    for (int c = 0; c < kGramTile; ++c)
        for (int k = 0; k < kGramDepth; ++k)
            check(writes[static_cast<size_t>(c * kGramPitch + k)] == 1, "slot not filled once", c, k);
    return rows;
}

// The first kernel: partial tiles by pair and split.
std::vector<float> partial_tiles(const Problem& problem, const GramPlan& plan) {
    std::vector<float> partial(static_cast<size_t>(plan.splits * plan.pairs * kGramTileSize), 0.0f);
    for (int64_t number = 0; number < plan.pairs; ++number)
        for (int64_t split = 0; split < plan.splits; ++split) {
            const GramPair pair = gram_pair(static_cast<int>(number));
            float* out = partial.data() + gram_partial(plan, split, number);
            for (int64_t step = gram_first_step(plan, split); step < gram_first_step(plan, split + 1); ++step) {
                const int64_t n = step / plan.steps_per_image, first = step % plan.steps_per_image * kGramDepth;
                const std::vector<float> left = fetch(problem, n, first, pair.i),
                                         right = fetch(problem, n, first, pair.j);
                for (int i = 0; i < kGramTile; ++i)
                    for (int j = 0; j < kGramTile; ++j)
                        for (int k = 0; k < kGramDepth; ++k)
                            out[i * kGramTile + j] += left[static_cast<size_t>(i * kGramPitch + k)] *
                                                      right[static_cast<size_t>(j * kGramPitch + k)];
            }
        }
    return partial;
}

// The second kernel: sums over splits, to both triangles.
std::vector<float> add_tiles(const Problem& problem, const GramPlan& plan, const std::vector<float>& partial,
                             std::vector<int>& hits) {
    const int64_t channels = problem.p.channels;
    std::vector<float> total(problem.total.size(), 0.5f);
    for (int64_t number = 0; number < plan.pairs; ++number) {
        const GramPair pair = gram_pair(static_cast<int>(number));
        for (int at = 0; at < kGramTileSize; ++at) {
            const int64_t i = pair.i * int64_t{kGramTile} + at / kGramTile,
                          j = pair.j * int64_t{kGramTile} + at % kGramTile;
            if (i >= channels || j > i) continue;
            float sum = total[static_cast<size_t>(i * channels + j)];
            for (int64_t s = 0; s < plan.splits; ++s)
                sum += partial[static_cast<size_t>(gram_partial(plan, s, number) + at)];
            total[static_cast<size_t>(i * channels + j)] = total[static_cast<size_t>(j * channels + i)] = sum;
            ++hits[static_cast<size_t>(i * channels + j)];
        }
    }
    return total;
}

void run(const Shape& s) {
    Problem problem(s);
    GramParams& p = problem.p;
    const GramPlan plan = gram_plan(p);
    check(gram_first_step(plan, 0) == 0 && gram_first_step(plan, plan.splits) == plan.steps, "splits cover all steps");
    std::vector<int> hits(problem.total.size(), 0);
    const std::vector<float> emulated = add_tiles(problem, plan, partial_tiles(problem, plan), hits);
    problem.workspace.resize(static_cast<size_t>(gram_workspace(p)));
    p.workspace = problem.workspace.data();
    check(gram_cpu(p) == Status::ok, "status");
    for (int64_t i = 0; i < s.c; ++i)
        for (int64_t j = 0; j < s.c; ++j) {
            const auto at = static_cast<size_t>(i * s.c + j);
            const double expected = problem.expected(i, j),
                         slack = 1e-4 * std::sqrt(static_cast<double>(s.n * s.h * s.w));
            check(std::fabs(emulated[at] - expected) <= slack, "emulated CUDA gram", i, j);
            check(std::fabs(problem.total[at] - expected) <= slack, "CPU gram", i, j);
            check(hits[at] == (j <= i ? 1 : 0), "entry not added once", i, j);
        }
}

}  // namespace

int main() {
    for (const Shape& shape : kShapes) run(shape);
    for (int number = 0; number < 200000; ++number) {
        const GramPair pair = gram_pair(number);
        check(pair.j >= 0 && pair.j <= pair.i && pair.i * (pair.i + 1) / 2 + pair.j == number, "pair", number);
    }
    return vss::test::result();
}
