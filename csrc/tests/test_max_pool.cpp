// max_pool: the CUDA kernels' places and windows run on the host with their own functions, against plain loops and the
// CPU kernels.
#include <cmath>

#include "check.h"
#include "max_pool_tile.h"

namespace {

using namespace vss;
using vss::test::check;

struct Shape {
    int64_t n, c, h, w, kernel;
    bool channels_last;
};

const Shape kShapes[] = {{1, 1, 2, 2, 2, false},
                         {2, 3, 13, 17, 2, false},
                         {2, 3, 13, 17, 3, false},
                         {1, 2, 3, 4, 1, false},
                         {2, 20, 8, 10, 2, true}};

struct Problem {
    std::vector<float> x, values;
    std::vector<int32_t> indices;
    MaxPoolParams p{};

    explicit Problem(const Shape& s) : x(vss::test::normal(static_cast<size_t>(s.n * s.c * s.h * s.w), 21)) {
        for (float& value : x) value = std::round(value);  // many ties
        x[x.size() / 2] = std::nanf("");
        p.input = x.data();
        p.batch = s.n, p.channels = s.c, p.height = s.h, p.width = s.w, p.kernel = s.kernel;
        p.pooled_h = s.h / s.kernel, p.pooled_w = s.w / s.kernel;
        const int64_t last[4] = {s.c * s.h * s.w, 1, s.w * s.c, s.c}, first[4] = {s.c * s.h * s.w, s.h * s.w, s.w, 1};
        for (int i = 0; i < 4; ++i) p.stride[i] = s.channels_last ? last[i] : first[i];
        values.resize(static_cast<size_t>(s.n * s.c * p.pooled_h * p.pooled_w));
        indices.resize(values.size());
        p.output = values.data(), p.indices = indices.data();
        p.threads = 2;
    }
};

void check_pool(Problem& problem) {
    const MaxPoolParams& p = problem.p;
    check(max_pool_cpu(p) == Status::ok, "status");
    for (int64_t at = 0; at < static_cast<int64_t>(problem.values.size()); ++at) {
        const PoolPlace place = pool_place(p, at);
        check((place.map * p.pooled_h + place.y) * p.pooled_w + place.x == at, "place", at);
        const float* map = problem.x.data() + pool_map_offset(p, place.map);
        const auto value = [&](int64_t y, int64_t x) { return map[y * p.stride[2] + x * p.stride[3]]; };
        const int64_t index = pool_argmax(p, place, value);
        const auto i = static_cast<size_t>(at);
        check(index == problem.indices[i], "emulated CUDA index", at, index);
        const float best = value(index / p.width, index % p.width), got = problem.values[i];
        check(best == got || (best != best && got != got), "CPU value", at);
        for (int64_t y = place.y * p.kernel; y < (place.y + 1) * p.kernel; ++y)
            for (int64_t x = place.x * p.kernel; x < (place.x + 1) * p.kernel; ++x) {
                const bool before = y * p.width + x < index;
                check(best != best || (before ? value(y, x) < best : value(y, x) <= best), "first maximum", at, index);
            }
    }
}

// Values return to where they came from; the CUDA kernel computes the same two offsets.
void check_unpool(const Problem& pooled) {
    MaxPoolParams p = pooled.p;
    std::vector<float> maps(static_cast<size_t>(p.batch * p.channels * p.height * p.width), 0.0f);
    std::vector<float> emulated(maps.size(), 0.0f);
    int32_t bad = 0;
    p.input = pooled.values.data(), p.output = maps.data(), p.bad_index = &bad;
    const int64_t stride[4] = {p.channels * p.pooled_h * p.pooled_w, p.pooled_h * p.pooled_w, p.pooled_w, 1};
    for (int i = 0; i < 4; ++i) p.stride[i] = stride[i];
    check(max_unpool_cpu(p) == Status::ok && bad == 0, "status");
    for (int64_t at = 0; at < static_cast<int64_t>(pooled.values.size()); ++at) {
        const PoolPlace place = pool_place(p, at);
        const int64_t source = pool_map_offset(p, place.map) + place.y * p.stride[2] + place.x * p.stride[3];
        const int64_t target = place.map * p.height * p.width + pooled.indices[static_cast<size_t>(at)];
        emulated[static_cast<size_t>(target)] = pooled.values[static_cast<size_t>(source)];
    }
    for (size_t i = 0; i < maps.size(); ++i)
        check(maps[i] == emulated[i] || (maps[i] != maps[i] && emulated[i] != emulated[i]), "unpooled value",
              static_cast<long long>(i));
}

}  // namespace

int main() {
    for (const Shape& shape : kShapes) {
        Problem problem(shape);
        check_pool(problem);
        check_unpool(problem);
    }
    return vss::test::result();
}
