// How the CUDA map_stats shares out its work, apart from it so that the host tests run the very same functions.
#pragma once

#include "map_stats.h"

namespace vss {

constexpr int kStatsThreads = 256;
constexpr int kStatsWarps = kStatsThreads / 32;
constexpr int kStatsBlocks = 1056;     // blocks to aim for: eight for each of 132 multiprocessors
constexpr int kStatsMostFloats = 512;  // values that a thread adds up in float

// The rectangle of positions that a warp takes at a time. Lanes are columns: 30 of them, since the outer two lanes hold
// neighbours alone, down 16 rows. Lanes are channels: a strip of 4 rows, along 32 columns.
constexpr int kColumnRows = 16, kColumnColumns = 30, kChannelRows = 4, kChannelColumns = 32;

struct StatsPlan {
    bool by_channel;        // lanes are channels (channels_last), or columns
    int64_t groups;         // maps, or groups of 32 channels of an image
    int64_t across, tasks;  // tasks side by side, and tasks of a map
    int64_t splits;         // blocks that share out the tasks of a group
    int32_t rows, columns;  // of a task
};

VSS_HD StatsPlan stats_plan(const MapStatsParams& p) {
    StatsPlan plan{};
    plan.by_channel = p.stride_c < p.stride_w && p.channels >= 16;
    plan.rows = plan.by_channel ? kChannelRows : kColumnRows;
    plan.columns = plan.by_channel ? kChannelColumns : kColumnColumns;
    plan.groups = p.batch * (plan.by_channel ? ceil_div(p.channels, 32) : p.channels);
    plan.across = ceil_div(p.width, plan.columns);
    plan.tasks = plan.across * ceil_div(p.height, plan.rows);
    // A thread adds up to `rows` values of a task, or, where its lane is a channel, all.
    const int values = plan.by_channel ? plan.rows * plan.columns : plan.rows;
    const int64_t wanted = plan.groups > 0 ? ceil_div(kStatsBlocks, plan.groups) : 1,
                  most = ceil_div(plan.tasks, kStatsWarps),
                  least = ceil_div(plan.tasks, kStatsWarps * (kStatsMostFloats / values));
    plan.splits = wanted < most ? wanted : most;
    plan.splits = plan.splits < least ? least : plan.splits;
    return plan;
}

// The rectangle of a task: rows y..y_end, columns x..x_end.
struct StatsTask {
    int32_t y, y_end, x, x_end;
};

VSS_HD StatsTask stats_task(const MapStatsParams& p, const StatsPlan& plan, uint32_t task) {
    const auto across = static_cast<uint32_t>(plan.across);
    const int64_t y = int64_t{task / across} * plan.rows, x = int64_t{task % across} * plan.columns;
    const int64_t y_end = y + plan.rows < p.height ? y + plan.rows : p.height,
                  x_end = x + plan.columns < p.width ? x + plan.columns : p.width;
    return {static_cast<int32_t>(y), static_cast<int32_t>(y_end), static_cast<int32_t>(x), static_cast<int32_t>(x_end)};
}

// A row or column of -1..size of a map seen through its padding: which one is read, and whether it is the padding.
struct Padded {
    int32_t at;
    bool outside;
};

VSS_HD Padded padded(int64_t at, int64_t size) {
    const bool outside = at < 0 || at >= size;
    return {static_cast<int32_t>(at < 0 ? 0 : (at < size ? at : size - 1)), outside};
}

}  // namespace vss
