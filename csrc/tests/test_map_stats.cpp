// map_stats: the CUDA kernel's blocks and threads run on the host with its own functions, against nine-neighbour sums
// in double; the CPU kernel on the same inputs.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "map_stats_tile.h"

namespace {

using namespace vss;
using vss::test::check;

struct Shape {
    int64_t n, c, h, w;
    bool channels_last, zeros;
};

const Shape kShapes[] = {
    {1, 1, 1, 1, false, false},  {2, 3, 5, 7, false, true},     {1, 2, 40, 300, false, false},
    {1, 1, 300, 3, false, true}, {1, 2, 1, 33, false, false},   {2, 37, 9, 11, true, false},
    {1, 16, 3, 20, true, true},  {1, 3, 64, 129, false, false},
};

MapStatsParams params_of(const Shape& s, const std::vector<float>& x) {
    MapStatsParams p{};
    p.maps = x.data();
    p.batch = s.n, p.channels = s.c, p.height = s.h, p.width = s.w;
    p.stride_n = s.c * s.h * s.w;
    p.stride_c = s.channels_last ? 1 : s.h * s.w;
    p.stride_h = s.channels_last ? s.w * s.c : s.w;
    p.stride_w = s.channels_last ? s.c : 1;
    p.zero_padding = s.zeros;
    p.threads = 2;
    return p;
}

// Element (y, x) through the padding, by the definition.
double padded(const MapStatsParams& p, const float* map, int64_t y, int64_t x) {
    if (p.zero_padding && (y < 0 || x < 0 || y >= p.height || x >= p.width)) return 0.0;
    const int64_t row = std::clamp<int64_t>(y, 0, p.height - 1), column = std::clamp<int64_t>(x, 0, p.width - 1);
    return map[row * p.stride_h + column * p.stride_w];
}

MapSums<double> definition(const MapStatsParams& p, const float* map) {
    const double kernel[3][3] = {{-0.5, 0, 0.5}, {-1, 0, 1}, {-0.5, 0, 0.5}};
    MapSums<double> sums{};
    for (int64_t y = 0; y < p.height; ++y)
        for (int64_t x = 0; x < p.width; ++x) {
            const double value = padded(p, map, y, x);
            double gx = 0, gy = 0;
            for (int i = 0; i < 3; ++i)
                for (int j = 0; j < 3; ++j) {
                    gx += kernel[i][j] * padded(p, map, y + i - 1, x + j - 1);
                    gy += kernel[i][j] * padded(p, map, y + j - 1, x + i - 1);
                }
            sums.positive += std::max(value, 0.0), sums.negative += std::max(-value, 0.0);
            sums.square += value * value;
            sums.edge += std::sqrt(gx * gx + gy * gy), sums.edge_square += gx * gx + gy * gy;
        }
    return sums;
}

void gather(MapSums<double>& sum, const MapSums<float>& part) {
    sum.positive += part.positive, sum.negative += part.negative, sum.square += part.square;
    sum.edge += part.edge, sum.edge_square += part.edge_square;
}

// What the threads of all blocks that make map (n, c) sum, and how often each position was visited.
MapSums<double> emulate(const MapStatsParams& p, const float* map, std::vector<int>& visits) {
    MapSums<double> sum{};
    const auto read = [&](int64_t y, int64_t x) {
        const int64_t offset = padded_offset(p, y, x);
        return offset < 0 ? 0.0f : map[offset];
    };
    const auto walk = [&](int64_t x, int64_t first, int64_t last) {
        MapSums<float> part{};
        walk_down(read, x, first, last, part);
        gather(sum, part);
        for (int64_t y = first; y < last; ++y) ++visits[static_cast<size_t>(y * p.width + x)];
    };
    if (stats_by_channel(p)) {
        for (int warp = 0; warp < kStatsWarps; ++warp)
            for (int64_t x = warp; x < p.width; x += kStatsWarps) walk(x, 0, p.height);
        return sum;
    }
    const int columns = stats_columns(p.width);
    for (int thread = 0; thread < kStatsThreads; ++thread) {
        const StatsBand band = stats_band(thread, columns, p.height);
        if (band.first >= band.last) continue;
        for (int64_t x = band.column; x < p.width; x += columns) walk(x, band.first, band.last);
    }
    return sum;
}

void compare(const MapSums<double>& expected, const float* got, const char* what, int64_t map) {
    float wanted[kMapStats];
    expected.store(wanted);
    const double size = 1e-6 + expected.positive + expected.negative;
    for (int s = 0; s < kMapStats; ++s)
        check(std::fabs(got[s] - wanted[s]) <= 1e-5 * std::max<double>(size, std::fabs(wanted[s])), what, map, s);
}

void run(const Shape& s) {
    const std::vector<float> x = vss::test::normal(static_cast<size_t>(s.n * s.c * s.h * s.w), 3);
    MapStatsParams p = params_of(s, x);
    std::vector<float> stats(static_cast<size_t>(s.n * s.c * kMapStats)), workspace;
    workspace.resize(static_cast<size_t>(map_stats_workspace(p)));
    p.stats = stats.data(), p.workspace = workspace.data();
    check(map_stats_cpu(p) == Status::ok, "status");
    for (int64_t map = 0; map < s.n * s.c; ++map) {
        const float* data = x.data() + map / s.c * p.stride_n + map % s.c * p.stride_c;
        const MapSums<double> expected = definition(p, data);
        compare(expected, stats.data() + map * kMapStats, "CPU sum", map);
        std::vector<int> visits(static_cast<size_t>(s.h * s.w), 0);
        float emulated[kMapStats];
        emulate(p, data, visits).store(emulated);
        compare(expected, emulated, "emulated CUDA sum", map);
        for (const int count : visits) check(count == 1, "position not visited once", map, count);
    }
}

}  // namespace

int main() {
    for (const Shape& shape : kShapes) run(shape);
    return vss::test::result();
}
