// greedy elimination against the O(C^3) definition, in double: the CPU kernel, and the CUDA kernel's threads run on the
// host with its own functions.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "greedy_tile.h"

namespace {

using namespace vss;
using vss::test::check;

std::vector<float> similarity(int64_t channels, uint32_t seed) {
    const std::vector<float> draw = vss::test::normal(static_cast<size_t>(channels * channels), seed);
    std::vector<float> a(draw.size());
    for (int64_t i = 0; i < channels; ++i)
        for (int64_t j = 0; j < channels; ++j)
            a[static_cast<size_t>(i * channels + j)] =
                std::fabs(draw[static_cast<size_t>(std::min(i, j) * channels + std::max(i, j))]);
    return a;
}

void check_definition(const std::vector<float>& a, int64_t channels, const int64_t* order, const double* value) {
    std::vector<bool> alive(static_cast<size_t>(channels), true);
    for (int64_t step = 0; step < channels; ++step) {
        int64_t best = -1;
        double best_sum = 0.0;
        for (int64_t i = 0; i < channels; ++i) {
            if (!alive[static_cast<size_t>(i)]) continue;
            double sum = 0.0;
            for (int64_t j = 0; j < channels; ++j)
                if (alive[static_cast<size_t>(j)]) sum += static_cast<double>(a[static_cast<size_t>(i * channels + j)]);
            if (best < 0 || sum > best_sum) best = i, best_sum = sum;
        }
        check(order[step] == best, "order", channels, step);
        check(std::fabs(value[best] - best_sum) < 1e-9 * (1.0 + best_sum), "value", channels, step);
        alive[static_cast<size_t>(best)] = false;
    }
}

// What the block of one matrix does: candidates of threads, of warps, of the block, as its shuffles combine them.
Candidate best_of_block(const std::vector<double>& sums, const std::vector<Removed>& removed) {
    Candidate leader{0.0, -1};
    for (int warp = kGreedyWarps - 1; warp >= 0; --warp) {
        Candidate best{0.0, -1};
        for (int lane = 31; lane >= 0; --lane) {
            const int thread = warp * 32 + lane;
            const Candidate own = best_of_thread(sums.data(), static_cast<int64_t>(sums.size()), thread,
                                                 removed[static_cast<size_t>(thread)]);
            best.offer(own.sum, own.index);
        }
        leader.offer(best.sum, best.index);
    }
    return leader;
}

void emulate_cuda(const std::vector<float>& a, int64_t channels, int64_t* order, double* value) {
    std::vector<double> sums(static_cast<size_t>(channels), 0.0);
    for (size_t at = 0; at < a.size(); ++at) sums[at / static_cast<size_t>(channels)] += static_cast<double>(a[at]);
    std::vector<Removed> removed(kGreedyThreads);
    for (int64_t step = 0; step < channels; ++step) {
        const Candidate best = best_of_block(sums, removed);
        order[step] = best.index;
        value[best.index] = best.sum;
        removed[static_cast<size_t>(best.index % kGreedyThreads)].add(best.index);
        for (int64_t i = 0; i < channels; ++i)
            if (!removed[static_cast<size_t>(i % kGreedyThreads)].has(i))
                sums[static_cast<size_t>(i)] -= static_cast<double>(a[static_cast<size_t>(best.index * channels + i)]);
    }
}

// The order of comparison does not matter, a NaN wins, the lowest index wins a tie.
void check_candidates() {
    const double nan = std::nan("");
    const Candidate all[] = {{1.0, 4}, {nan, 9}, {nan, 7}, {2.0, 3}, {2.0, 1}, {0.0, -1}};
    for (const Candidate& first : all)
        for (const Candidate& second : all) {
            Candidate a = first, b = second;
            a.offer(second.sum, second.index);
            b.offer(first.sum, first.index);
            check(a.index == b.index, "candidates commute", first.index, second.index);
        }
    Candidate best{0.0, -1};
    for (const Candidate& one : all) best.offer(one.sum, one.index);
    check(best.index == 7, "the lowest NaN wins", best.index);
    Removed removed;
    removed.add(65535);
    check(removed.has(65535) && !removed.has(1023), "the last channel has a bit of its own");
}

}  // namespace

int main() {
    check_candidates();
    const int64_t widths[] = {1, 2, 15, 16, 17, 33, 64, 65, 100, 200, 1100};
    std::vector<std::vector<float>> inputs;
    std::vector<std::vector<int64_t>> orders;
    std::vector<std::vector<double>> values;
    std::vector<GreedyMatrix> matrices;
    for (const int64_t c : widths) {
        inputs.push_back(similarity(c, static_cast<uint32_t>(c)));
        orders.emplace_back(static_cast<size_t>(c));
        values.emplace_back(static_cast<size_t>(c));
    }
    for (size_t i = 0; i < inputs.size(); ++i)
        matrices.push_back({inputs[i].data(), widths[i], widths[i], orders[i].data(), values[i].data()});
    GreedyParams p{matrices.data(), static_cast<int64_t>(matrices.size()), 2, nullptr};
    std::vector<double> workspace(static_cast<size_t>(greedy_workspace(p)));
    p.workspace = workspace.data();
    check(greedy_cpu(p) == Status::ok, "status");
    for (size_t i = 0; i < inputs.size(); ++i) {
        if (widths[i] <= 200) check_definition(inputs[i], widths[i], orders[i].data(), values[i].data());
        std::vector<int64_t> order(orders[i].size());
        std::vector<double> value(values[i].size());
        emulate_cuda(inputs[i], widths[i], order.data(), value.data());
        check(order == orders[i], "emulated CUDA order", widths[i]);
        for (size_t c = 0; c < value.size(); ++c)
            check(std::fabs(value[c] - values[i][c]) < 1e-9 * (1.0 + value[c]), "emulated CUDA value", widths[i]);
    }
    return vss::test::result();
}
