// Per-map statistics in one read of the maps: sums of the values and of their Sobel edge strength.
#pragma once

#include "common.h"

namespace vss {

// Columns of the result.
enum MapStat : int { kAbsSum, kSum, kSquareSum, kPositiveSum, kNegativeSum, kEdgeSum, kEdgeSquareSum, kMapStats };

struct MapStatsParams {
    const void* maps;  // (batch, channels, height, width), any strides
    DType dtype;
    int64_t batch, channels, height, width;
    int64_t stride_n, stride_c, stride_h, stride_w;  // in elements
    bool zero_padding;                               // around a map: zeros, else its border values
    float* stats;                                    // (batch, channels, kMapStats)
    float* workspace;  // map_stats_workspace() floats, or map_stats_workspace_cuda() on CUDA, aligned for doubles
    int threads;       // CPU only: at least 1
};

int64_t map_stats_workspace(const MapStatsParams& p);
int64_t map_stats_workspace_cuda(const MapStatsParams& p);

// Edge strength is sqrt(gx^2 + gy^2) with the kernel [[-.5 0 .5] [-1 0 1] [-.5 0 .5]] and its transpose.
Status map_stats_cpu(const MapStatsParams& p);
Status map_stats_cuda(const MapStatsParams& p, CUstream_st* stream);

// Sums over one map. Sums of |x| and x follow from the sums of the two signs; NaN gets into all of them.
template <typename Real>
struct MapSums {
    static constexpr int kColumns = kMapStats;

    Real positive, negative, square, edge, edge_square;

    template <typename Other>
    VSS_HD void add(const MapSums<Other>& part) {
        positive += part.positive, negative += part.negative, square += part.square;
        edge += part.edge, edge_square += part.edge_square;
    }

    VSS_CALLS_EITHER
    template <typename Visit>
    VSS_HD void each(const Visit& visit) {
        visit(positive), visit(negative), visit(square), visit(edge), visit(edge_square);
    }

    VSS_HD void store(float* stats) const {
        stats[kAbsSum] = static_cast<float>(positive + negative);
        stats[kSum] = static_cast<float>(positive - negative);
        stats[kSquareSum] = static_cast<float>(square);
        stats[kPositiveSum] = static_cast<float>(positive);
        stats[kNegativeSum] = static_cast<float>(negative);
        stats[kEdgeSum] = static_cast<float>(edge);
        stats[kEdgeSquareSum] = static_cast<float>(edge_square);
    }
};

}  // namespace vss
