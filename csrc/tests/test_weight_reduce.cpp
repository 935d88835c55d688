// weight_reduce: the CUDA source run on the host, and the CPU kernel, against sums in double.
#include "weight_reduce.cu"

#include "maps.h"

namespace {

using namespace vss;
using vss::test::check;
using vss::test::Layout;
using vss::test::Maps;

struct Shape {
    int64_t outer, channels, inner;
};

const Shape kShapes[] = {{1, 5, 27},   {1, 1, 7},    {33, 17, 1},  {1, 9, 1},     {2, 4, 1640},
                         {3, 2, 5600}, {64, 300, 9}, {40, 500, 1}, {1, 70, 2304}, {1, 3, 24577},
                         {5, 3, 33},   {300, 2, 40}, {1, 600, 1},  {2, 3, 31},    {700, 1, 9}};

double term(Reduce mode, double weight, double grad) {
    return mode == Reduce::l1        ? std::fabs(weight)
           : mode == Reduce::l2      ? weight * weight
           : mode == Reduce::product ? weight * grad
                                     : std::fabs(weight * grad);
}

// All shapes as layers of one call; tasks of teams on CUDA are so many times longer than they have to be.
void run(Reduce mode, DType dtype, int64_t longer = 1) {
    const bool grads = mode == Reduce::product || mode == Reduce::abs_product;
    std::vector<Maps> weights, slopes;
    int64_t channels = 0;
    for (const Shape& s : kShapes) {
        weights.emplace_back(vss::test::Sizes{s.outer, s.channels, 1, s.inner}, Layout::contiguous, dtype, 9);
        slopes.emplace_back(weights.back().sizes, Layout::contiguous, dtype, 10);
        channels += s.channels;
    }
    std::vector<float> sums(static_cast<size_t>(channels), NAN), cuda(sums), wanted, sizes;
    for (size_t layer = 0; layer < weights.size(); ++layer)
        for (int64_t c = 0; c < kShapes[layer].channels; ++c) {
            double sum = 0.0, size = 0.0;
            for (int64_t o = 0; o < kShapes[layer].outer; ++o)
                for (int64_t i = 0; i < kShapes[layer].inner; ++i) {
                    const double each = term(mode, weights[layer].at(o, c, 0, i), slopes[layer].at(o, c, 0, i));
                    sum += each, size += std::fabs(each);
                }
            wanted.push_back(static_cast<float>(mode == Reduce::l2 ? std::sqrt(sum) : sum));
            sizes.push_back(static_cast<float>(size));
        }
    for (float* out : {sums.data(), cuda.data()}) {
        const bool on_cuda = out == cuda.data();
        std::vector<ReduceTensor> tensors;
        std::vector<ReduceTask> tasks;
        for (size_t layer = 0; layer < weights.size(); ++layer) {
            const Shape& s = kShapes[layer];
            const ReduceTensor t{
                weights[layer].data(), grads ? slopes[layer].data() : nullptr, s.outer, s.channels, s.inner, out};
            const int64_t share = !on_cuda          ? reduce_channels_per_task(t)
                                  : reduce_short(t) ? reduce_channels_cuda(t)
                                                    : longer * reduce_channels_cuda(t);
            for (int64_t first = 0; first < s.channels; first += share)
                tasks.push_back({static_cast<int32_t>(layer), static_cast<int32_t>(first),
                                 static_cast<int32_t>(std::min(first + share, s.channels))});
            tensors.push_back(t);
            out += s.channels;
        }
        const WeightReduceParams p{tensors.data(), tasks.data(), static_cast<int64_t>(tasks.size()), dtype, mode, 2};
        if (on_cuda)
            vss::test::in_every_order(cuda, [&] { return weight_reduce_cuda(p, nullptr); });
        else
            check(weight_reduce_cpu(p) == Status::ok, "status");
    }
    for (size_t c = 0; c < wanted.size(); ++c) {
        check(std::fabs(sums[c] - wanted[c]) <= 3e-6f * sizes[c], "CPU sum", static_cast<long long>(c));
        check(std::fabs(cuda[c] - wanted[c]) <= 3e-6f * sizes[c], "CUDA sum", static_cast<long long>(c));
    }
}

// How many of the threads of a block have elements, and that every element of a channel is read once.
void check_shares() {
    for (const Shape& s : {Shape{1, 256, 2304}, {1, 256, 18432}, {1, 64, 147}, {2, 512, 2304}, {1, 2048, 512}}) {
        const ReduceTensor t{nullptr, nullptr, s.outer, s.channels, s.inner, nullptr};
        const int team = reduce_team(t);
        check(reduce_channels_cuda(t) * team >= kReduceThreads, "idle teams", s.channels, s.inner);
        std::vector<int> reads(static_cast<size_t>(s.outer * s.inner));
        for (int thread = 0; thread < team; ++thread) {
            const ReduceShare share = reduce_share(t, team, thread);
            for (int64_t o = share.o; o < t.outer; o += share.outer_step)
                for (int64_t i = share.i; i < t.inner; i += share.step) ++reads[static_cast<size_t>(o * t.inner + i)];
        }
        for (const int count : reads) check(count == 1, "element not read once", count);
    }
    const ReduceTensor huge{nullptr, nullptr, kMaxBlocks, kMaxBlocks, 1, nullptr};
    check(reduce_start(huge, kMaxBlocks - 1, kMaxBlocks - 1) > 0, "offsets beyond 2^62 keep their sign");
    for (int64_t inner = 1; inner < 32; ++inner) {
        const ReduceTensor t{nullptr, nullptr, 2, 100, inner, nullptr};
        const int64_t channels = reduce_channels_cuda(t);
        check(channels >= 1 && channels * inner <= kReduceMostRun, "a run fits its sums", channels, inner);
    }
}

}  // namespace

int main() {
    run(Reduce::l1, DType::f32);
    run(Reduce::l2, DType::bf16, 3);
    run(Reduce::product, DType::f32);
    run(Reduce::abs_product, DType::f16);
    check_shares();
    return vss::test::result();
}
