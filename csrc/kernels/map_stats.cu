// CUDA: lanes run along the contiguous axis, and each warp takes one rectangle of positions after the other.
// Lanes are columns: a lane walks down its column and gets its neighbours' values by shuffles, so that every value is
// fetched once (and the border of a rectangle once more). Lanes are channels (channels_last): a warp walks along a
// strip of four rows and fetches six values for four. The Sobel kernel is separable: rows or columns of three are
// combined once and kept. A thread adds up to kStatsMostFloats values in float; everything after that is double.
#include <cmath>

#include "common.cuh"
#include "map_stats_tile.h"

namespace vss {
namespace {

using Sums = MapSums<float>;
using Totals = MapSums<double>;

__device__ __forceinline__ void add_position(Sums& sums, float value, float gx, float gy) {
    sums.positive += value < 0.0f ? 0.0f : value;
    sums.negative += value > 0.0f ? 0.0f : -value;
    sums.square += value * value;
    const float strength = gx * gx + gy * gy;
    sums.edge += sqrtf(strength);
    sums.edge_square += strength;
}

// A row at one column: its value, the difference of its neighbours, and its smoothed value.
struct RowTerms {
    float value, differ, smooth;

    __device__ __forceinline__ explicit RowTerms(float mid) : value(mid) {
        const float left = __shfl_up_sync(kAll, mid, 1), right = __shfl_down_sync(kAll, mid, 1);
        differ = right - left;
        smooth = 0.5f * (left + right) + mid;
    }
};

// Rows y..y_end at the columns of a warp, the first of which is column x - 1.
template <typename T>
__device__ __forceinline__ void walk_down(const MapStatsParams& p, const T* map, const StatsTask& task, Sums& total) {
    const int lane = threadIdx.x % 32;
    const int64_t x = int64_t{task.x} - 1 + lane;
    const bool counts = lane >= 1 && lane <= kColumnColumns && x < p.width;
    const Padded column = padded(x, p.width), above = padded(int64_t{task.y} - 1, p.height);
    const bool zero = column.outside && p.zero_padding;
    const T* at = map + column.at * p.stride_w;
    const float first = above.outside && p.zero_padding ? 0.0f : load(at + above.at * p.stride_h);
    at += task.y * p.stride_h;
    RowTerms up(zero ? 0.0f : first), mid(zero ? 0.0f : load(at));
    Sums sums{};
    constexpr int kAhead = 4;  // rows that are fetched before the first of them is needed
    for (int32_t y = task.y; y < task.y_end; y += kAhead) {
        float ahead[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            const bool inside = y + j + 1 < p.height && y + j < task.y_end;
            if (inside) at += p.stride_h;
            ahead[j] = zero || (!inside && p.zero_padding) ? 0.0f : load(at);
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            if (y + j >= task.y_end) break;
            const RowTerms down(ahead[j]);
            add_position(sums, mid.value, 0.5f * (up.differ + down.differ) + mid.differ, down.smooth - up.smooth);
            up = mid;
            mid = down;
        }
    }
    if (counts) total.add(sums);
}

template <typename T>
__global__ void __launch_bounds__(kStatsThreads, 4)
    column_lanes(MapStatsParams p, const T* maps, StatsPlan plan, Totals* parts) {
    const auto splits = static_cast<uint32_t>(plan.splits), channels = static_cast<uint32_t>(p.channels);
    const uint32_t group = blockIdx.x / splits, split = blockIdx.x % splits;
    const T* map = maps + group / channels * p.stride_n + group % channels * p.stride_c;
    const uint32_t warp = threadIdx.x / 32, tasks = static_cast<uint32_t>(plan.tasks);
    Sums sums{};
    for (uint32_t task = split * kStatsWarps + warp; task < tasks; task += splits * kStatsWarps) {
        walk_down(p, map, stats_task(p, plan, task), sums);
    }
    Totals total{};
    total.add(sums);
    add_lanes(total);
    __shared__ Totals partial[kStatsWarps];
    if (threadIdx.x % 32 == 0) partial[warp] = total;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int w = 1; w < kStatsWarps; ++w) total.add(partial[w]);
    if (splits == 1) {
        total.store(p.stats + group * int64_t{kMapStats});
    } else {
        parts[split * plan.groups + group] = total;
    }
}

// One column of a strip: per row its value, the smoothed value and the difference of the rows around it.
struct ColumnTerms {
    float value[kChannelRows], smooth[kChannelRows], differ[kChannelRows];
};

// The rows of a strip of one channel, with the one above and the one below.
template <typename T>
struct Strip {
    static constexpr int kRows = kChannelRows;
    const T* row[kRows + 2];
    bool zero[kRows + 2];

    __device__ __forceinline__ Strip(const MapStatsParams& p, const T* map, int32_t y) {
#pragma unroll
        for (int r = 0; r < kRows + 2; ++r) {
            const Padded place = padded(int64_t{y} - 1 + r, p.height);
            row[r] = map + place.at * p.stride_h;
            zero[r] = place.outside && p.zero_padding;
        }
    }

    __device__ __forceinline__ ColumnTerms column(const MapStatsParams& p, int64_t x) const {
        const Padded place = padded(x, p.width);
        const int64_t offset = place.at * p.stride_w;
        const bool none = place.outside && p.zero_padding;
        float values[kRows + 2];
#pragma unroll
        for (int r = 0; r < kRows + 2; ++r) values[r] = none || zero[r] ? 0.0f : load(row[r] + offset);
        ColumnTerms terms;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            terms.value[r] = values[r + 1];
            terms.smooth[r] = 0.5f * (values[r] + values[r + 2]) + values[r + 1];
            terms.differ[r] = values[r + 2] - values[r];
        }
        return terms;
    }
};

template <typename T>
__device__ __forceinline__ void walk_along(const MapStatsParams& p, const T* map, const StatsTask& task, Sums& sums) {
    const Strip<T> strip(p, map, task.y);
    ColumnTerms left = strip.column(p, int64_t{task.x} - 1), mid = strip.column(p, task.x);
    for (int32_t x = task.x; x < task.x_end; ++x) {
        const ColumnTerms right = strip.column(p, int64_t{x} + 1);
#pragma unroll
        for (int r = 0; r < Strip<T>::kRows; ++r) {
            if (task.y + r >= task.y_end) break;
            add_position(sums, mid.value[r], right.smooth[r] - left.smooth[r],
                         0.5f * (left.differ[r] + right.differ[r]) + mid.differ[r]);
        }
        left = mid;
        mid = right;
    }
}

template <typename T>
__global__ void __launch_bounds__(kStatsThreads, 2)
    channel_lanes(MapStatsParams p, const T* maps, StatsPlan plan, Totals* parts) {
    const auto splits = static_cast<uint32_t>(plan.splits), across = static_cast<uint32_t>(ceil_div(p.channels, 32));
    const uint32_t group = blockIdx.x / splits, split = blockIdx.x % splits;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t n = group / across, c = group % across * int64_t{32} + lane;
    const auto tasks = static_cast<uint32_t>(plan.tasks);
    Sums sums{};
    if (c < p.channels) {
        const T* map = maps + n * p.stride_n + c * p.stride_c;
        for (uint32_t task = split * kStatsWarps + warp; task < tasks; task += splits * kStatsWarps) {
            walk_along(p, map, stats_task(p, plan, task), sums);
        }
    }
    __shared__ Sums partial[kStatsWarps][32];
    partial[warp][lane] = sums;
    __syncthreads();
    if (warp > 0 || c >= p.channels) return;
    Totals total{};
    for (int w = 0; w < kStatsWarps; ++w) total.add(partial[w][lane]);
    const int64_t map = n * p.channels + c;
    if (splits == 1) {
        total.store(p.stats + map * kMapStats);
    } else {
        parts[split * p.batch * p.channels + map] = total;
    }
}

}  // namespace

int64_t map_stats_workspace_cuda(const MapStatsParams& p) {
    const StatsPlan plan = stats_plan(p);
    constexpr int64_t kFloats = sizeof(Totals) / sizeof(float);
    return plan.splits > 1 ? plan.splits * p.batch * p.channels * kFloats : 0;
}

Status map_stats_cuda(const MapStatsParams& p, CUstream_st* stream) {
    if (p.height < 1 || p.width < 1) return Status::bad_argument;
    if (p.batch * p.channels == 0) return Status::ok;
    const StatsPlan plan = stats_plan(p);
    if (p.batch * p.channels > kMaxBlocks || plan.tasks + plan.splits * kStatsWarps > kMaxBlocks) {
        return Status::bad_argument;
    }
    auto* parts = reinterpret_cast<Totals*>(p.workspace);
    const Status status = visit_dtype(p.maps, p.dtype, [&](auto* maps) {
        using T = std::decay_t<decltype(*maps)>;
        return launch(plan.by_channel ? channel_lanes<T> : column_lanes<T>, plan.groups * plan.splits, kStatsThreads,
                      stream, p, maps, plan, parts);
    });
    if (status != Status::ok || plan.splits == 1) return status;
    const int64_t maps = p.batch * p.channels;
    return launch(add_parts<Totals>, ceil_div(maps, kAddMaps), kAddThreads, stream, static_cast<const Totals*>(parts),
                  maps, static_cast<int>(plan.splits), p.stats);
}

}  // namespace vss
