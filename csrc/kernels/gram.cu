// CUDA: 64x64 tiles of the lower triangle on tensor cores, 32 positions a step. While a step is multiplied, the values
// of the next are on their way into registers; from there they go, scaled and as floats, into the other half of shared
// memory (a copy past the registers could neither scale nor widen them). Each float is split into two TF32 parts and
// three products are summed; the fourth is below 2^-22 of the product. Tensor cores cut off what does not fit into a
// sum instead of rounding it, so they sum one step alone, and the sums of steps are added with rounding. Where the
// triangle has too few tiles to fill the device, positions are split among blocks; partial tiles are summed in a fixed
// order, so results are reproducible.
#include <mma.h>

#include "common.cuh"
#include "gram_tile.h"

namespace vss {
namespace {

using namespace nvcuda;

// The values of one step that a thread has fetched for either side, as they are in memory; zero outside.
struct Fetched {
    float value[2][kGramFetches];
};

// Which part of the work is at hand: image n, positions `first` and on, channels from channel[side] on.
struct Place {
    int64_t first;
    int32_t n, channel[2];
};

// `walk` is at the thread's position and moves on to that of the next step.
template <bool ByChannel, typename T>
__device__ __forceinline__ void fetch(const GramParams& p, const GramPlan& plan, const T* maps, const Place& place,
                                      bool both, Walk& walk, Fetched& fetched) {
    const auto thread = static_cast<int>(threadIdx.x);
    const GramSlot slot = gram_slot<ByChannel>(thread, 0);
    const int32_t channel[2] = {place.channel[0] + slot.channel, place.channel[1] + slot.channel};
    const T* at[2] = {maps + place.n * p.stride_n + channel[0] * p.stride_c,
                      maps + place.n * p.stride_n + channel[1] * p.stride_c};
#pragma unroll
    for (int f = 0; f < kGramFetches; ++f) {
        const int more_channels = ByChannel ? 0 : f * (kGramThreads / kGramDepth),
                  more_positions = ByChannel ? f * kGramWalk<ByChannel> : 0;
        const bool inside = place.first + slot.position + more_positions < plan.positions;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const bool wanted = inside && channel[side] + more_channels < p.channels && (side == 0 || both);
            fetched.value[side][f] = wanted ? load(at[side] + walk.offset) : 0.0f;
            if (!ByChannel) at[side] += (kGramThreads / kGramDepth) * p.stride_c;
        }
        if (ByChannel) walk.next();
    }
    if (!ByChannel) walk.next();
}

// What is subtracted from the values of a panel's channels, and what they are multiplied by.
struct Scales {
    float mean[kGramTile], factor[kGramTile];
};

__device__ __forceinline__ void fill_scales(const GramParams& p, int64_t n, int64_t first_channel, int at,
                                            Scales& scales) {
    const int64_t channel = first_channel + at;
    const bool inside = channel < p.channels;
    scales.mean[at] = p.means && inside ? load(p.means + channel) : 0.0f;
    scales.factor[at] = p.norms && inside ? 1.0f / load(p.norms + n * p.channels + channel) : 1.0f;
}

template <bool ByChannel>
__device__ __forceinline__ void put(const GramPlan& plan, int64_t first, const float (&fetched)[kGramFetches],
                                    const Scales& scales, float* rows) {
#pragma unroll
    for (int f = 0; f < kGramFetches; ++f) {
        const GramSlot slot = gram_slot<ByChannel>(static_cast<int>(threadIdx.x), f);
        const float value = (fetched[f] - scales.mean[slot.channel]) * scales.factor[slot.channel];
        rows[slot.at] = first + slot.position < plan.positions ? value : 0.0f;
    }
}

// Splits a fragment of floats into TF32 parts high + low.
template <typename Fragment>
__device__ __forceinline__ void split(Fragment& high, Fragment& low) {
#pragma unroll
    for (int e = 0; e < high.num_elements; ++e) {
        const float value = high.x[e];
        high.x[e] = wmma::__float_to_tf32(value);
        low.x[e] = wmma::__float_to_tf32(value - high.x[e]);
    }
}

template <bool ByChannel>
using RowsOf = std::conditional_t<ByChannel, wmma::col_major, wmma::row_major>;
template <bool ByChannel>
using Left = wmma::fragment<wmma::matrix_a, 16, 16, 8, wmma::precision::tf32, RowsOf<ByChannel>>;
template <bool ByChannel>
using Right = wmma::fragment<wmma::matrix_b, 16, 16, 8, wmma::precision::tf32, RowsOf<!ByChannel>>;
using Sums = wmma::fragment<wmma::accumulator, 16, 16, 8, float>;

// Where the value of a channel and a position lies.
template <bool ByChannel>
__device__ __forceinline__ const float* at(const float* rows, int channel, int position) {
    return rows + (ByChannel ? position * kGramPitchByChannel + channel : channel * kGramPitch + position);
}

// Adds the product of 32 channels of `left` from `row` on and 32 of `right` from `column` on.
template <bool ByChannel>
__device__ __forceinline__ void multiply(const float* left, int row, const float* right, int column,
                                         Sums (&total)[2][2]) {
    constexpr int kPitch = ByChannel ? kGramPitchByChannel : kGramPitch;
    Sums sums[2][2];
    for (auto& line : sums)
        for (auto& sum : line) wmma::fill_fragment(sum, 0.0f);
#pragma unroll 1
    for (int k = 0; k < kGramDepth; k += 8) {
        Left<ByChannel> left_high[2], left_low[2];
        Right<ByChannel> right_high[2], right_low[2];
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            wmma::load_matrix_sync(left_high[t], at<ByChannel>(left, row + t * 16, k), kPitch);
            wmma::load_matrix_sync(right_high[t], at<ByChannel>(right, column + t * 16, k), kPitch);
            split(left_high[t], left_low[t]);
            split(right_high[t], right_low[t]);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                wmma::mma_sync(sums[i][j], left_low[i], right_high[j], sums[i][j]);
                wmma::mma_sync(sums[i][j], left_high[i], right_low[j], sums[i][j]);
                wmma::mma_sync(sums[i][j], left_high[i], right_high[j], sums[i][j]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int e = 0; e < Sums::num_elements; ++e) total[i][j].x[e] += sums[i][j].x[e];
        }
    }
}

template <typename T, bool ByChannel>
__global__ void __launch_bounds__(kGramThreads, kGramResident)
    partial_tiles(GramParams p, const T* maps, GramPlan plan) {
    __shared__ __align__(128) float panels[2][2][kGramPanel];  // by step and side
    __shared__ Scales scales[2];                               // by side
    const auto pairs = static_cast<uint32_t>(plan.pairs);
    const uint32_t number = blockIdx.x % pairs, part = blockIdx.x / pairs;
    const GramPair pair = gram_pair(static_cast<int>(number));
    const bool both = pair.i != pair.j;  // else left and right are one panel
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / 32, row = warp / 2 * 32, column = warp % 2 * 32;
    const int64_t begin = gram_first_step(plan, part), end = gram_first_step(plan, part + int64_t{1});
    Place place{begin % plan.steps_per_image * kGramDepth,
                static_cast<int32_t>(begin / plan.steps_per_image),
                {pair.i * kGramTile, pair.j * kGramTile}};
    const int position = gram_slot<ByChannel>(thread, 0).position;
    const Walk start(position, kGramWalk<ByChannel>, plan.width, p.stride_h, p.stride_w);
    Walk walk(place.first + position, kGramWalk<ByChannel>, plan.width, p.stride_h, p.stride_w);
    Fetched fetched;

    const auto new_image = [&] {
        const int side = thread / kGramTile;
        fill_scales(p, place.n, side == 0 ? place.channel[0] : place.channel[1], thread % kGramTile, scales[side]);
        __syncthreads();
    };
    const auto put_step = [&](int half) {
        put<ByChannel>(plan, place.first, fetched.value[0], scales[0], panels[half][0]);
        if (both) put<ByChannel>(plan, place.first, fetched.value[1], scales[1], panels[half][1]);
        __syncthreads();
    };

    Sums sums[2][2];
    for (auto& line : sums)
        for (auto& sum : line) wmma::fill_fragment(sum, 0.0f);
    fetch<ByChannel>(p, plan, maps, place, both, walk, fetched);
    new_image();
    put_step(0);
    int half = 0;
    for (int64_t left = end - begin; left > 0; --left) {
        const bool more = left > 1;
        bool crosses = false;
        if (more) {
            place.first += kGramDepth;
            crosses = place.first >= plan.positions;
            if (crosses) place.first = 0, ++place.n, walk = start;
            fetch<ByChannel>(p, plan, maps, place, both, walk, fetched);
        }
        multiply<ByChannel>(panels[half][0], row, panels[half][both ? 1 : 0], column, sums);
        if (!more) break;
        if (crosses) new_image();
        half = 1 - half;
        put_step(half);
    }
    float* out = p.workspace + gram_partial(plan, part, number) + row * kGramTile + column;
    for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j)
            wmma::store_matrix_sync(out + i * 16 * kGramTile + j * 16, sums[i][j], kGramTile, wmma::mem_row_major);
}

constexpr int kSumThreads = 256;
constexpr int kSumWarps = kSumThreads / 32;
constexpr int kSumBlocks = kGramTileSize / 32;  // of a pair; a lane has one entry, a warp every kSumWarps-th split

// Sums the partial tiles of one pair of panels and adds them, and their mirror image, to the matrix.
__global__ void __launch_bounds__(kSumThreads) add_tiles(GramParams p, GramPlan plan) {
    __shared__ float parts[kSumWarps][32];
    const uint32_t number = blockIdx.x / kSumBlocks;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int entry = static_cast<int>(blockIdx.x % kSumBlocks) * 32 + lane;
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t s = warp; s < plan.splits; s += kSumWarps) sum += p.workspace[gram_partial(plan, s, number) + entry];
    parts[warp][lane] = sum;
    __syncthreads();
    const GramPair pair = gram_pair(static_cast<int>(number));
    const int64_t i = pair.i * int64_t{kGramTile} + entry / kGramTile,
                  j = pair.j * int64_t{kGramTile} + entry % kGramTile;
    if (warp > 0 || i >= p.channels || j > i) return;
    for (int w = 1; w < kSumWarps; ++w) sum += parts[w][lane];
    const float total = p.total[i * p.channels + j] + sum;
    p.total[i * p.channels + j] = total;
    p.total[j * p.channels + i] = total;
}

}  // namespace

int64_t gram_workspace_cuda(const GramParams& p) {
    const GramPlan plan = gram_plan(p);
    return plan.splits * plan.pairs * kGramTileSize;
}

Status gram_cuda(const GramParams& p, CUstream_st* stream) {
    const GramPlan plan = gram_plan(p);
    if (p.channels < 1 || plan.positions < 1 || plan.pairs > kMaxBlocks / kSumBlocks) return Status::bad_argument;
    if (p.batch < 1) return Status::ok;
    const Status status = visit_dtype(p.maps, p.dtype, [&](auto* maps) {
        using T = std::decay_t<decltype(*maps)>;
        return launch(plan.by_channel ? partial_tiles<T, true> : partial_tiles<T, false>, plan.pairs * plan.splits,
                      kGramThreads, stream, p, maps, plan);
    });
    if (status != Status::ok) return status;
    return launch(add_tiles, plan.pairs * kSumBlocks, kSumThreads, stream, p, plan);
}

}  // namespace vss
