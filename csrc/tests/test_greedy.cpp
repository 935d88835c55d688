// greedy elimination against the O(C^3) definition, in double.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "greedy.h"

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

}  // namespace

int main() {
    const int64_t widths[] = {1, 2, 15, 16, 17, 33, 64, 65, 100, 200};
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
    for (size_t i = 0; i < inputs.size(); ++i)
        check_definition(inputs[i], widths[i], orders[i].data(), values[i].data());
    return vss::test::result();
}
