// max_pool: the CUDA source run on the host, and the CPU kernels, against plain loops; divisions near 2^31.
#include "max_pool.cu"

#include "maps.h"

namespace {

using namespace vss;
using vss::test::check;
using vss::test::Layout;
using vss::test::Maps;

struct Row {
    vss::test::Sizes sizes;
    int64_t kernel = 2;
    Layout layout = Layout::contiguous;
    DType dtype = DType::f32;
};

const Row kRows[] = {
    {{1, 1, 2, 2}},
    {{2, 3, 13, 17}},
    {{2, 3, 13, 17}, 3},
    {{1, 2, 3, 4}, 1},
    {{0, 3, 4, 6}},
    {{2, 20, 8, 10}, 2, Layout::channels_last},
    {{2, 3, 8, 10}, 2, Layout::strided, DType::f16},
    {{2, 3, 9, 31}, 4, Layout::transposed, DType::bf16},
};

struct Pooled {
    std::vector<float> values;
    std::vector<int32_t> indices;
};

// The first maximum in reading order, a NaN above all.
Pooled definition(const Maps& x, int64_t kernel) {
    const auto [batch, channels, height, width] = x.sizes;
    Pooled pooled;
    for (int64_t map = 0; map < batch * channels; ++map)
        for (int64_t py = 0; py < height / kernel; ++py)
            for (int64_t px = 0; px < width / kernel; ++px) {
                int64_t best = -1;
                const auto value = [&, columns = width, count = channels](int64_t at) {
                    return x.at(map / count, map % count, at / columns, at % columns);
                };
                for (int64_t i = 0; i < kernel * kernel; ++i) {
                    const int64_t at = (py * kernel + i / kernel) * width + px * kernel + i % kernel;
                    if (best < 0 || value(at) > value(best) || (std::isnan(value(at)) && !std::isnan(value(best))))
                        best = at;
                }
                pooled.values.push_back(value(best));
                pooled.indices.push_back(static_cast<int32_t>(best));
            }
    return pooled;
}

// Values of `bytes` written by a kernel, as floats.
std::vector<float> as_floats(const std::vector<uint8_t>& bytes, DType dtype, size_t count) {
    std::vector<float> values(count);
    for (size_t i = 0; i < count; ++i) {
        uint16_t bits = 0;
        if (dtype == DType::f32) std::memcpy(&values[i], bytes.data() + 4 * i, 4);
        if (dtype == DType::f32) continue;
        std::memcpy(&bits, bytes.data() + 2 * i, 2);
        values[i] = dtype == DType::f16 ? to_float(Half{bits}) : to_float(BFloat16{bits});
    }
    return values;
}

void compare(const std::vector<float>& got, const std::vector<float>& wanted, const char* what) {
    for (size_t i = 0; i < wanted.size(); ++i)
        check(got[i] == wanted[i] || (std::isnan(got[i]) && std::isnan(wanted[i])), what, static_cast<long long>(i));
}

void run(const Row& row) {
    Maps x(row.sizes, row.layout, row.dtype, 21);
    for (float& value : x.values) value = std::round(value);  // many ties
    if (x.count() > 4) x.values[x.count() / 2] = x.values[1] = std::nanf("");
    x.store();
    const Pooled wanted = definition(x, row.kernel);
    MaxPoolParams p{};
    p.dtype = row.dtype, p.kernel = row.kernel, p.threads = 2;
    p.batch = row.sizes[0], p.channels = row.sizes[1], p.height = row.sizes[2], p.width = row.sizes[3];
    p.pooled_h = p.height / p.kernel, p.pooled_w = p.width / p.kernel;
    for (const auto pool : {+[](const MaxPoolParams& given) { return max_pool_cpu(given); },
                            +[](const MaxPoolParams& given) { return max_pool_cuda(given, nullptr); }}) {
        std::vector<uint8_t> values(wanted.values.size() * 4);
        std::vector<int32_t> indices(wanted.values.size(), -1);
        p.input = x.data(), p.output = values.data(), p.indices = indices.data();
        std::copy_n(x.stride, 4, p.stride);
        check(pool(p) == Status::ok, "status");
        compare(as_floats(values, row.dtype, indices.size()), wanted.values, "pooled value");
        check(indices == wanted.indices, "indices");
    }
    // Values go back to where they came from; one index is outside.
    Maps small({p.batch, p.channels, p.pooled_h, p.pooled_w}, row.layout, row.dtype, 22);
    std::vector<int32_t> indices = wanted.indices;
    std::vector<float> maps(x.count(), 0.0f);
    for (size_t i = 0; i < indices.size(); ++i) {
        const size_t map = i / static_cast<size_t>(p.pooled_h * p.pooled_w);
        if (i > 0 && i + 1 == indices.size())
            indices[i] = static_cast<int32_t>(p.height * p.width);
        else
            maps[map * static_cast<size_t>(p.height * p.width) + static_cast<size_t>(indices[i])] = small.values[i];
    }
    for (const auto unpool : {+[](const MaxPoolParams& given) { return max_unpool_cpu(given); },
                              +[](const MaxPoolParams& given) { return max_unpool_cuda(given, nullptr); }}) {
        std::vector<uint8_t> output(maps.size() * 4, 0);
        p.input = small.data(), p.output = output.data(), p.indices = indices.data();
        std::copy_n(small.stride, 4, p.stride);
        check(unpool(p) == Status::ok, "status");
        compare(as_floats(output, row.dtype, maps.size()), maps, "unpooled value");
    }
}

void check_division() {
    const int64_t divisors[] = {1, 2, 3, 5, 7, 10, 641, 65535, 65536, 65537, 10800, 1 << 30, (1 << 30) + 1, kMaxBlocks};
    for (const int64_t by : divisors) {
        const FastDiv divide(by);
        const auto at = [&](int64_t value) {
            if (value < 0 || value > kMaxBlocks) return;
            const auto n = static_cast<uint32_t>(value);
            check(divide.quotient(n) == value / by && divide.remainder(n) == value % by, "division", value, by);
        };
        for (int64_t value = 0; value < 3000; ++value) at(value), at(kMaxBlocks - value);
        for (int64_t value = by; value <= kMaxBlocks; value += by * (1 + kMaxBlocks / by / 1000))
            at(value - 1), at(value);
    }
    std::mt19937 random(3);
    for (int draw = 0; draw < 2000000; ++draw) {
        const uint32_t by = 1 + random() % static_cast<uint32_t>(kMaxBlocks), value = random() >> 1;
        check(FastDiv(by).quotient(value) == value / by, "drawn division", value, by);
    }
}

// Launches are full but below 2^31 values, and places near the end are those of int64 division.
void check_places(int64_t batch, int64_t channels, int64_t pooled_h, int64_t pooled_w) {
    MaxPoolParams p{};
    p.batch = batch, p.channels = channels, p.pooled_h = pooled_h, p.pooled_w = pooled_w;
    const int64_t maps = batch * channels, at_once = std::min(pool_maps(p), maps), per_map = pooled_h * pooled_w;
    check(at_once * per_map + kPoolThreads <= kMaxBlocks, "values of a launch", at_once, per_map);
    const int64_t first = (maps - 1) / at_once * at_once;
    const PoolLaunch part(p, first, maps - first);
    for (int64_t back = 1; back <= std::min<int64_t>(5000, part.values); ++back) {
        const PoolPlace place = pool_place(part, static_cast<uint32_t>(part.values - back));
        const int64_t at = maps * per_map - back, map = at / per_map;
        check(place.map == map && place.n == map / channels && place.c == map % channels, "map of a place", back);
        check(place.y == at % per_map / pooled_w && place.x == at % pooled_w, "place", back);
    }
}

}  // namespace

int main() {
    for (const Row& row : kRows) run(row);
    check_division();
    check_places(4, 64, 180, 240);
    check_places(1, 1, 46340, 46339);
    check_places(3, 70000, 1024, 30);
    check_places(32768, 65535, 1, 1);
    check_places(2, 3, 1, kMaxBlocks - kPoolThreads);
    return vss::test::result();
}
