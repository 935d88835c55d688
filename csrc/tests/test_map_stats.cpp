// map_stats: the CUDA source run on the host, and the CPU kernel, against nine-neighbour sums in double.
#include "map_stats.cu"

#include "maps.h"

namespace {

using namespace vss;
using vss::test::check;
using vss::test::Layout;
using vss::test::Maps;

struct Row {
    vss::test::Sizes sizes;
    Layout layout = Layout::contiguous;
    DType dtype = DType::f32;
    bool zeros = false;
};

const Row kRows[] = {
    {{1, 1, 1, 1}},
    {{3, 5, 1, 1}, Layout::contiguous, DType::f32, true},
    {{2, 3, 5, 7}, Layout::contiguous, DType::f32, true},
    {{1, 2, 40, 300}},
    {{1, 1, 300, 3}, Layout::contiguous, DType::f32, true},
    {{1, 2, 1, 33}},
    {{1, 3, 64, 129}, Layout::contiguous, DType::bf16},
    {{2, 5, 8, 9}, Layout::strided},
    {{2, 18, 8, 9}, Layout::strided, DType::f16, true},
    {{2, 5, 38, 35}, Layout::transposed, DType::f32, true},
    {{2, 37, 9, 11}, Layout::channels_last},
    {{1, 16, 3, 70}, Layout::channels_last, DType::f32, true},
    {{2, 18, 16, 17}, Layout::channels_last, DType::f16},
    {{1, 33, 1, 1}, Layout::channels_last, DType::bf16, true},
    {{3, 0, 4, 5}},
};

MapStatsParams params_of(const Row& row, const Maps& maps) {
    MapStatsParams p{};
    p.maps = maps.data(), p.dtype = row.dtype;
    p.batch = row.sizes[0], p.channels = row.sizes[1], p.height = row.sizes[2], p.width = row.sizes[3];
    p.stride_n = maps.stride[0], p.stride_c = maps.stride[1], p.stride_h = maps.stride[2], p.stride_w = maps.stride[3];
    p.zero_padding = row.zeros;
    p.threads = 2;
    return p;
}

// Element (y, x) through the padding, by the definition.
double through_padding(const MapStatsParams& p, const Maps& maps, int64_t map, int64_t y, int64_t x) {
    if (p.zero_padding && (y < 0 || x < 0 || y >= p.height || x >= p.width)) return 0.0;
    return maps.at(map / p.channels, map % p.channels, std::clamp<int64_t>(y, 0, p.height - 1),
                   std::clamp<int64_t>(x, 0, p.width - 1));
}

MapSums<double> definition(const MapStatsParams& p, const Maps& maps, int64_t map) {
    const double kernel[3][3] = {{-0.5, 0, 0.5}, {-1, 0, 1}, {-0.5, 0, 0.5}};
    MapSums<double> sums{};
    const auto at = [&](int64_t y, int64_t x) { return through_padding(p, maps, map, y, x); };
    for (int64_t y = 0; y < p.height; ++y)
        for (int64_t x = 0; x < p.width; ++x) {
            double gx = 0, gy = 0;
            for (int i = 0; i < 3; ++i)
                for (int j = 0; j < 3; ++j) {
                    gx += kernel[i][j] * at(y + i - 1, x + j - 1);
                    gy += kernel[i][j] * at(y + j - 1, x + i - 1);
                }
            const double value = at(y, x);
            sums.positive += std::max(value, 0.0), sums.negative += std::max(-value, 0.0);
            sums.square += value * value;
            sums.edge += std::sqrt(gx * gx + gy * gy), sums.edge_square += gx * gx + gy * gy;
        }
    return sums;
}

void compare(const MapSums<double>& expected, const float* got, const char* what, int64_t map) {
    float wanted[kMapStats];
    expected.store(wanted);
    const double size = 1e-6 + expected.positive + expected.negative;
    for (int s = 0; s < kMapStats; ++s)
        check(std::fabs(got[s] - wanted[s]) <= 3e-6 * std::max<double>(size, std::fabs(wanted[s])), what, map, s);
}

void run(const Row& row) {
    const Maps maps(row.sizes, row.layout, row.dtype, 3);
    MapStatsParams p = params_of(row, maps);
    std::vector<float> stats(static_cast<size_t>(p.batch * p.channels * kMapStats), NAN), cuda(stats), workspace;
    workspace.assign(static_cast<size_t>(std::max(map_stats_workspace(p), map_stats_workspace_cuda(p))), NAN);
    p.stats = stats.data(), p.workspace = workspace.data();
    check(map_stats_cpu(p) == Status::ok, "status");
    p.stats = cuda.data();
    vss::test::in_every_order(cuda, [&] { return map_stats_cuda(p, nullptr); });
    for (int64_t map = 0; map < p.batch * p.channels; ++map) {
        const MapSums<double> expected = definition(p, maps, map);
        compare(expected, stats.data() + map * kMapStats, "CPU sum", map);
        compare(expected, cuda.data() + map * kMapStats, "CUDA sum", map);
    }
}

// The tasks of a plan are the map, each position once; sides near 2^31 by their first and last tasks.
void check_plan(int64_t batch, int64_t channels, int64_t height, int64_t width, bool channels_last) {
    MapStatsParams p{};
    p.batch = batch, p.channels = channels, p.height = height, p.width = width;
    p.stride_c = channels_last ? 1 : height * width, p.stride_w = channels_last ? channels : 1;
    const StatsPlan plan = stats_plan(p);
    check(plan.splits >= 1, "splits", plan.splits);
    const int values = plan.by_channel ? plan.rows * plan.columns : plan.rows;
    check(ceil_div(plan.tasks, plan.splits * kStatsWarps) * values <= kStatsMostFloats, "values of a thread",
          plan.tasks, plan.splits);
    if (plan.tasks > kMaxBlocks) return;
    const StatsTask last = stats_task(p, plan, static_cast<uint32_t>(plan.tasks - 1));
    check(last.y_end == height && last.x_end == width, "the last task ends the map", height, width);
    check(last.y >= 0 && last.y < last.y_end && last.x >= 0 && last.x < last.x_end, "the last task", height, width);
    if (height * width > 1 << 20) return;
    std::vector<int> visits(static_cast<size_t>(height * width));
    for (int64_t task = 0; task < plan.tasks; ++task) {
        const StatsTask at = stats_task(p, plan, static_cast<uint32_t>(task));
        for (int64_t y = at.y; y < at.y_end; ++y)
            for (int64_t x = at.x; x < at.x_end; ++x) ++visits[static_cast<size_t>(y * width + x)];
    }
    for (const int count : visits) check(count == 1, "a position is in one task", height, width);
}

// A launch that fails carries CUDA's sentence, and does not blame this kernel for an earlier one.
void check_failures() {
    const Maps maps({1, 1, 3, 3}, Layout::contiguous, DType::f32, 3);
    MapStatsParams p = params_of({{1, 1, 3, 3}}, maps);
    std::vector<float> stats(kMapStats);
    p.stats = stats.data();
    vss::test::next_launch = cudaErrorNoKernelImageForDevice;
    const Status refused = map_stats_cuda(p, nullptr);
    check(refused == Status::launch_failed && std::strcmp(refused.text, "no kernel image") == 0, "launch failure");
    vss::test::next_launch = cudaErrorIllegalAddress;
    check(map_stats_cuda(p, nullptr) == Status::earlier_failed, "an earlier kernel's failure");
    check(map_stats_cuda(p, nullptr) == Status::ok, "a launch after a failed one");
}

}  // namespace

int main() {
    for (const Row& row : kRows) run(row);
    for (const bool last : {false, true})
        for (const int64_t side : {1, 2, 29, 30, 31, 32, 33, 61, 240})
            for (const int64_t other : {1, 3, 4, 15, 16, 17, 70}) {
                check_plan(2, 40, side, other, last);
                check_plan(300, 16, other, side, last);
            }
    check_plan(1, 1, kMaxBlocks, 1, false);
    check_plan(1, 16, 1, kMaxBlocks, true);
    check_plan(1, 64, 46340, 46341, true);
    check_plan(1, 3, kMaxBlocks, 400, false);
    check_failures();
    return vss::test::result();
}
