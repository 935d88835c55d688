// CPU: the running sums live in the workspace, minus infinity for removed channels. Each step is one pass that
// subtracts a row and finds the new maximum, then a search for its first position.
#include "greedy.h"

#include <limits>

namespace vss {
namespace {

constexpr int kLanes = 16;

// sums[i] -= row[i]; returns the largest new sum. `sums` and `row` hold finite numbers or, for the removed, -infinity.
VSS_CLONES double subtract_and_max(double* __restrict sums, const float* __restrict row, int64_t count) {
    constexpr double kLowest = -std::numeric_limits<double>::infinity();
    double best[kLanes];
    for (int j = 0; j < kLanes; ++j) best[j] = kLowest;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (int j = 0; j < kLanes; ++j) {
            const double sum = sums[i + j] - static_cast<double>(row[i + j]);
            sums[i + j] = sum;
            best[j] = sum > best[j] ? sum : best[j];
        }
    }
    for (; i < count; ++i) {
        sums[i] -= static_cast<double>(row[i]);
        best[0] = sums[i] > best[0] ? sums[i] : best[0];
    }
    for (int j = 1; j < kLanes; ++j) best[0] = best[j] > best[0] ? best[j] : best[0];
    return best[0];
}

VSS_CLONES double sum_row(const float* row, int64_t count) {
    double lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (int j = 0; j < kLanes; ++j) lanes[j] += static_cast<double>(row[i + j]);
    }
    double total = 0.0;
    for (int j = 0; j < kLanes; ++j) total += lanes[j];
    for (; i < count; ++i) total += static_cast<double>(row[i]);
    return total;
}

// In chunks of a fixed length, so that a chunk is compared at vector width before its first match is looked for.
VSS_CLONES int64_t find_first(const double* sums, double wanted, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        int64_t matches = 0;
        for (int j = 0; j < kLanes; ++j) matches += sums[i + j] == wanted ? 1 : 0;
        if (matches > 0) break;
    }
    for (; i < count; ++i) {
        if (sums[i] == wanted) return i;
    }
    return -1;
}

// All similarities are finite, so every sum is, and minus infinity marks the removed.
void eliminate_finite(const GreedyMatrix& m, double* sums) {
    const int64_t count = m.channels;
    double best = -std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i < count; ++i) best = sums[i] > best ? sums[i] : best;
    for (int64_t step = 0; step < count; ++step) {
        const int64_t k = find_first(sums, best, count);
        m.order[step] = k;
        m.value[k] = best;
        sums[k] = -std::numeric_limits<double>::infinity();
        best = subtract_and_max(sums, m.similarity + k * m.stride_row, count);
    }
}

// The plain form, for matrices that hold an infinity or a NaN.
void eliminate_special(const GreedyMatrix& m, double* sums, uint8_t* alive) {
    for (int64_t i = 0; i < m.channels; ++i) alive[i] = 1;
    for (int64_t step = 0; step < m.channels; ++step) {
        int64_t best = -1;
        for (int64_t i = 0; i < m.channels; ++i) {
            if (!alive[i]) continue;
            const bool wins = best < 0 || (!(sums[i] <= sums[best]) && sums[best] == sums[best]);
            best = wins ? i : best;
        }
        m.order[step] = best;
        m.value[best] = sums[best];
        alive[best] = 0;
        const float* row = m.similarity + best * m.stride_row;
        for (int64_t i = 0; i < m.channels; ++i) sums[i] -= static_cast<double>(row[i]);
    }
}

void eliminate(const GreedyMatrix& m, double* sums) {
    bool finite = true;
    for (int64_t i = 0; i < m.channels; ++i) {
        sums[i] = sum_row(m.similarity + i * m.stride_row, m.channels);
        finite = finite && sums[i] - sums[i] == 0.0;
    }
    auto* alive = reinterpret_cast<uint8_t*>(sums + m.channels);
    finite ? eliminate_finite(m, sums) : eliminate_special(m, sums, alive);
}

}  // namespace

int64_t greedy_workspace(const GreedyParams& p) {
    int64_t widest = 0;
    for (int64_t i = 0; i < p.count; ++i) widest = p.matrices[i].channels > widest ? p.matrices[i].channels : widest;
    return 2 * widest * p.threads;
}

Status greedy_cpu(const GreedyParams& p) {
    if (p.threads < 1) return Status::bad_argument;
    const int64_t per_thread = greedy_workspace(p) / p.threads;
#pragma omp parallel for schedule(dynamic) num_threads(p.threads) if (p.threads > 1 && p.count > 1)
    for (int64_t i = 0; i < p.count; ++i) eliminate(p.matrices[i], p.workspace + thread_index() * per_thread);
    return Status::ok;
}

}  // namespace vss
