// weight_reduce: the CUDA kernel's tasks and threads run on the host with its own functions, against sums in double;
// the CPU kernel on the same inputs.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "weight_reduce_tile.h"

namespace {

using namespace vss;
using vss::test::check;

struct Shape {
    int64_t outer, channels, inner;
};

const Shape kShapes[] = {{1, 5, 27},   {1, 1, 7},    {33, 17, 1},   {1, 9, 1},     {2, 4, 1640},
                         {3, 2, 5600}, {64, 300, 9}, {40, 5000, 1}, {1, 70, 2304}, {3, 5, 0}};

// Sums of one task as the threads of its block make them; counts how often every element was read.
void emulate_task(const ReduceTensor& t, const ReduceTask& task, std::vector<double>& sums, std::vector<int>& reads) {
    const auto* weight = static_cast<const float*>(t.weight);
    const auto read = [&](int64_t at) {
        ++reads[static_cast<size_t>(at)];
        return static_cast<double>(std::fabs(weight[at]));
    };
    if (reduce_by_element(t, task)) {
        const int64_t count = reduce_run(t, task);
        check(count <= kReduceChunk, "a run does not fit its sums", count);
        std::vector<double> run(static_cast<size_t>(count), 0.0);
        for (int thread = 0; thread < kReduceThreads; ++thread)
            for (int64_t i = thread; i < count; i += kReduceThreads)
                for (int64_t o = 0; o < t.outer; ++o)
                    run[static_cast<size_t>(i)] += read(reduce_start(t, o, task.first) + i);
        for (int64_t c = task.first; c < task.last; ++c)
            for (int64_t i = 0; i < t.inner; ++i)
                sums[static_cast<size_t>(c)] += run[static_cast<size_t>((c - task.first) * t.inner + i)];
        return;
    }
    for (int warp = 0; warp < kReduceWarps; ++warp)
        for (int64_t c = task.first + warp; c < task.last; c += kReduceWarps)
            for (int lane = 0; lane < 32; ++lane)
                for (int64_t o = 0; o < t.outer; ++o)
                    for (int64_t i = lane; i < t.inner; i += 32)
                        sums[static_cast<size_t>(c)] += read(reduce_start(t, o, c) + i);
}

std::vector<ReduceTask> tasks_of(const ReduceTensor& t, int64_t chunk) {
    const int64_t share = std::max<int64_t>(1, reduce_channels_per_task(t, chunk));
    std::vector<ReduceTask> tasks;
    for (int64_t first = 0; first < t.channels; first += share)
        tasks.push_back({0, static_cast<int32_t>(first), static_cast<int32_t>(std::min(first + share, t.channels))});
    return tasks;
}

void run(const Shape& s) {
    const std::vector<float> weight = vss::test::normal(static_cast<size_t>(s.outer * s.channels * s.inner), 9);
    std::vector<float> out(static_cast<size_t>(s.channels));
    const ReduceTensor t{weight.data(), nullptr, s.outer, s.channels, s.inner, out.data()};
    std::vector<double> expected(out.size(), 0.0);
    for (size_t at = 0; at < weight.size(); ++at)
        expected[at / static_cast<size_t>(s.inner) % out.size()] += std::fabs(static_cast<double>(weight[at]));
    for (const int64_t chunk : {int64_t{256}, kReduceChunk}) {
        const std::vector<ReduceTask> tasks = tasks_of(t, chunk);
        std::vector<double> sums(out.size(), 0.0);
        std::vector<int> reads(weight.size(), 0);
        for (const ReduceTask& task : tasks) emulate_task(t, task, sums, reads);
        const WeightReduceParams p{&t, tasks.data(), static_cast<int64_t>(tasks.size()), DType::f32, Reduce::l1, 2};
        check(weight_reduce_cpu(p) == Status::ok, "status");
        for (size_t c = 0; c < out.size(); ++c) {
            check(std::fabs(sums[c] - expected[c]) <= 1e-9 * (1.0 + expected[c]), "emulated CUDA sum",
                  static_cast<long long>(c));
            check(std::fabs(out[c] - expected[c]) <= 1e-5 * (1.0 + expected[c]), "CPU sum", static_cast<long long>(c));
        }
        for (const int count : reads) check(count == 1, "element not read once", count);
    }
}

}  // namespace

int main() {
    for (const Shape& shape : kShapes) run(shape);
    return vss::test::result();
}
