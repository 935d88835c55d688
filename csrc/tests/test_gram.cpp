// gram: the CUDA source run on the host, and the CPU kernel, against the definition in double.
#include "gram.cu"

#include "maps.h"

namespace {

using namespace vss;
using vss::test::check;
using vss::test::Layout;
using vss::test::Maps;

struct Row {
    vss::test::Sizes sizes;
    Layout layout = Layout::contiguous;
    bool norms = true, means = true;
    DType dtype = DType::f32;
};

const Row kRows[] = {
    {{1, 1, 1, 1}},
    {{2, 7, 3, 5}},
    {{3, 65, 1, 1}, Layout::contiguous, false},
    {{2, 34, 40, 21}, Layout::contiguous, true, false},
    {{1, 130, 5, 33}, Layout::contiguous, false, false},
    {{2, 37, 18, 19}, Layout::strided, true, true, DType::f16},
    {{2, 37, 18, 19}, Layout::transposed},
    {{9, 70, 9, 11}, Layout::channels_last},
    {{5, 64, 8, 8}, Layout::channels_last, true, false, DType::bf16},
    {{2, 66, 8, 9}, Layout::channels_last, false, true, DType::f16},
};

void run(const Row& row) {
    const Maps x(row.sizes, row.layout, row.dtype, 5);
    const auto [batch, channels, height, width] = row.sizes;
    const std::vector<float> means = vss::test::normal(static_cast<size_t>(channels), 6);
    std::vector<float> norms(static_cast<size_t>(batch * channels)),
        total(static_cast<size_t>(channels * channels), 0.5f);
    for (size_t i = 0; i < norms.size(); ++i) norms[i] = 1.0f + static_cast<float>(i % 5);
    GramParams p{};
    p.maps = x.data(), p.dtype = row.dtype;
    p.norms = row.norms ? norms.data() : nullptr, p.means = row.means ? means.data() : nullptr;
    p.batch = batch, p.channels = channels, p.height = height, p.width = width;
    p.stride_n = x.stride[0], p.stride_c = x.stride[1], p.stride_h = x.stride[2], p.stride_w = x.stride[3];
    p.threads = 2;
    std::vector<float> cuda(total),
        space(static_cast<size_t>(std::max(gram_workspace(p), gram_workspace_cuda(p))), NAN);
    p.total = total.data(), p.workspace = space.data();
    check(gram_cpu(p) == Status::ok, "status");
    p.total = cuda.data();
    vss::test::in_every_order(cuda, [&] { return gram_cuda(p, nullptr); });
    const auto value = [&, count = channels, wide = width](int64_t image, int64_t c, int64_t at) {
        const double raw = x.at(image, c, at / wide, at % wide) - (row.means ? means[static_cast<size_t>(c)] : 0.0f);
        return row.norms ? raw / norms[static_cast<size_t>(image * count + c)] : raw;
    };
    for (int64_t i = 0; i < channels; ++i)
        for (int64_t j = 0; j < channels; ++j) {
            double expected = 0.5, size = 0.5;
            for (int64_t n = 0; n < batch; ++n)
                for (int64_t at = 0; at < height * width; ++at) {
                    const double product = value(n, i, at) * value(n, j, at);
                    expected += product, size += std::fabs(product);
                }
            const auto at = static_cast<size_t>(i * channels + j);
            check(std::fabs(total[at] - expected) <= 2e-6 * size, "CPU gram", i, j);
            check(std::fabs(cuda[at] - expected) <= 2e-6 * size, "CUDA gram", i, j);
        }
}

// A single product shows what the split into TF32 parts loses.
void check_precision() {
    for (int draw = 0; draw < 200; ++draw) {
        const std::vector<float> pair = vss::test::normal(2, static_cast<uint32_t>(draw));
        float total[4] = {};
        std::vector<float> space(kGramTileSize);
        GramParams p{};
        p.maps = pair.data(), p.batch = 1, p.channels = 2, p.height = p.width = 1;
        p.stride_n = 2, p.stride_c = p.stride_h = p.stride_w = 1;
        p.total = total, p.workspace = space.data();
        check(gram_cuda(p, nullptr) == Status::ok, "status");
        const double exact = double{pair[0]} * pair[1];
        check(std::fabs(total[1] - exact) <= 0x1p-21 * std::fabs(exact), "precision of a product", draw);
    }
}

// Sums of many steps in one block: what tensor cores cut off must not add up.
void check_long_split() {
    constexpr int64_t kPositions = 16384;
    std::vector<float> values = vss::test::normal(2 * kPositions, 31), total(4), space(kGramTileSize);
    for (float& value : values) value = std::fabs(value);
    GramParams p{};
    p.maps = values.data(), p.batch = 1, p.channels = 2, p.height = 1, p.width = kPositions;
    p.stride_n = 2 * kPositions, p.stride_c = p.stride_h = kPositions, p.stride_w = 1;
    p.total = total.data(), p.workspace = space.data();
    GramPlan plan = gram_plan(p);
    plan.splits = 1;
    vss::test::order = vss::test::Order::up;
    const auto* maps = static_cast<const float*>(p.maps);
    check(launch(partial_tiles<float, false>, 1, kGramThreads, nullptr, p, maps, plan) == Status::ok, "status");
    check(launch(add_tiles, kSumBlocks, kSumThreads, nullptr, p, plan) == Status::ok, "status");
    for (int64_t i = 0; i < 2; ++i) {
        double exact = 0.0;
        for (int64_t at = 0; at < kPositions; ++at)
            exact += double{values[static_cast<size_t>(i * kPositions + at)]} * values[static_cast<size_t>(at)];
        const double error = std::fabs(total[static_cast<size_t>(i * 2)] - exact) / exact;
        check(error <= 2e-6, "the sum of a long split", i, std::llround(error * 1e9));
    }
}

template <bool ByChannel>
void check_slots() {
    std::vector<int> writes(kGramPanel), values(kGramTile * kGramDepth);
    for (int thread = 0; thread < kGramThreads; ++thread)
        for (int f = 0; f < kGramFetches; ++f) {
            const GramSlot slot = gram_slot<ByChannel>(thread, f);
            ++writes[static_cast<size_t>(slot.at)];
            ++values[static_cast<size_t>(slot.channel * kGramDepth + slot.position)];
        }
    for (const int count : writes) check(count <= 1, "a slot written twice", count);
    for (const int count : values) check(count == 1, "a value not fetched once", count);
    // Writes of a warp, and what the eight by four lanes of a fragment read, are in 32 different banks.
    for (int warp = 0; warp < kGramThreads / 32; ++warp) {
        uint32_t written = 0;
        for (int lane = 0; lane < 32; ++lane) written |= 1u << gram_slot<ByChannel>(warp * 32 + lane, 0).at % 32;
        check(written == 0xffffffffu, "banks of the writes of a warp", warp);
    }
    uint32_t read = 0;
    for (int lane = 0; lane < 32; ++lane) {
        const int channel = lane / 4, position = lane % 4;
        read |= 1u << (ByChannel ? position * kGramPitchByChannel + channel : channel * kGramPitch + position) % 32;
    }
    check(read == 0xffffffffu, "banks of a fragment");
}

void check_plan(int64_t batch, int64_t channels, int64_t height, int64_t width) {
    GramParams p{};
    p.batch = batch, p.channels = channels, p.height = height, p.width = width;
    const GramPlan plan = gram_plan(p);
    check(gram_first_step(plan, 0) == 0 && gram_first_step(plan, plan.splits) == plan.steps, "splits cover all steps");
    const int64_t blocks = plan.pairs * plan.splits;
    check(plan.splits == 1 || blocks <= kGramBlocks * (plan.pairs * 6 <= kGramBlocks ? 1 : 4), "blocks", channels,
          blocks);
    for (int64_t split = 0; split < plan.splits; ++split)
        check(gram_first_step(plan, split) < gram_first_step(plan, split + 1), "a split without steps", split);
}

}  // namespace

int main() {
    for (const Row& row : kRows) run(row);
    check_precision();
    check_long_split();
    check_slots<false>();
    check_slots<true>();
    for (const int64_t channels : {1, 64, 65, 512, 4096})
        for (const int64_t positions : {1, 31, 32, 33, 10800}) check_plan(3, channels, positions, 1);
    check_plan(kMaxBlocks, 1, kMaxBlocks, 1);
    for (int number = 0; number < 2000000; number += 1 + number / 100000) {
        const GramPair pair = gram_pair(number);
        check(pair.j >= 0 && pair.j <= pair.i && pair.i * (pair.i + 1) / 2 + pair.j == number, "pair", number);
    }
    return vss::test::result();
}
