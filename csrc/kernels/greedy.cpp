// CPU: the running sums live in the workspace, minus infinity for removed channels. The first sums take the lower
// triangle alone; each step is one pass that subtracts a row and keeps the maximum of every block of sums.
#include "greedy.h"

#include <limits>

namespace vss {
namespace {

constexpr int kLanes = 16;

constexpr int64_t kBlock = 64;  // sums that share a kept maximum
constexpr double kRemoved = -std::numeric_limits<double>::infinity();

// The largest of up to kBlock sums after sums[i] -= row[i]. They are finite or, for the removed, -infinity.
inline __attribute__((always_inline)) double subtract_block(double* __restrict sums, const float* __restrict row,
                                                            int64_t count) {
    double best[kLanes];
    for (int j = 0; j < kLanes; ++j) best[j] = kRemoved;
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

// sums -= row, and the maximum of every block; a block of which nothing is left is passed over.
VSS_CLONES void subtract(double* __restrict sums, const float* __restrict row, int64_t count,
                         double* __restrict maxima) {
    for (int64_t first = 0, b = 0; first < count; first += kBlock, ++b) {
        if (maxima[b] == kRemoved) continue;
        const int64_t length = count - first < kBlock ? count - first : kBlock;
        maxima[b] = subtract_block(sums + first, row + first, length);
    }
}

// Adds row i of the lower triangle to the sums of both channels of every pair.
VSS_CLONES void add_triangle_row(double* __restrict sums, const float* __restrict row, int64_t i) {
    double lanes[kLanes] = {};
    int64_t j = 0;
    for (; j + kLanes <= i; j += kLanes) {
        for (int l = 0; l < kLanes; ++l) {
            const auto value = static_cast<double>(row[j + l]);
            sums[j + l] += value;
            lanes[l] += value;
        }
    }
    double total = static_cast<double>(row[i]);
    for (; j < i; ++j) {
        sums[j] += static_cast<double>(row[j]);
        total += static_cast<double>(row[j]);
    }
    for (int l = 0; l < kLanes; ++l) total += lanes[l];
    sums[i] = total;
}

// The first position of the largest sum: the first block that has it, then the first within.
int64_t first_largest(const double* sums, const double* maxima, int64_t count) {
    int64_t block = 0;
    for (int64_t b = 1; b * kBlock < count; ++b) block = maxima[b] > maxima[block] ? b : block;
    int64_t i = block * kBlock;
    while (sums[i] != maxima[block]) ++i;
    return i;
}

// All similarities are finite, so every sum is, and minus infinity marks the removed.
void eliminate_finite(const GreedyMatrix& m, double* sums, double* maxima) {
    const int64_t count = m.channels;
    for (int64_t b = 0; b * kBlock < count; ++b) {
        maxima[b] = sums[b * kBlock];
        const int64_t last = (b + 1) * kBlock < count ? (b + 1) * kBlock : count;
        for (int64_t i = b * kBlock; i < last; ++i) maxima[b] = sums[i] > maxima[b] ? sums[i] : maxima[b];
    }
    for (int64_t step = 0; step < count; ++step) {
        const int64_t k = first_largest(sums, maxima, count);
        m.order[step] = k;
        m.value[k] = sums[k];
        sums[k] = kRemoved;
        subtract(sums, m.similarity + k * m.stride_row, count, maxima);
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
    for (int64_t i = 0; i < m.channels; ++i) add_triangle_row(sums, m.similarity + i * m.stride_row, i);
    bool finite = true;
    for (int64_t i = 0; i < m.channels; ++i) finite = finite && sums[i] - sums[i] == 0.0;
    double* rest = sums + m.channels;
    finite ? eliminate_finite(m, sums, rest) : eliminate_special(m, sums, reinterpret_cast<uint8_t*>(rest));
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
