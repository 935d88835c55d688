// CUDA: 64x64 tiles of the lower triangle on tensor cores. Factors are split into two TF32 parts and three products are
// summed (the fourth is below float32), so results are as exact as float32. Where the triangle has too few tiles to
// fill the device, positions are split among blocks; partial tiles are summed in a fixed order, so results are
// reproducible.
#include <mma.h>

#include "common.cuh"
#include "gram.h"

namespace vss {
namespace {

using namespace nvcuda;

constexpr int kTile = 64;      // channels of a tile's side
constexpr int kDepth = 32;     // positions of a step
constexpr int kPitch = 36;     // floats of a row in shared memory
constexpr int kThreads = 128;  // four warps, each a quarter of the tile
constexpr int kBlocks = 528;   // blocks to aim for: four for each of 132 multiprocessors
constexpr int kTileSize = kTile * kTile;

struct Plan {
    int64_t panels, pairs, steps_per_image, steps, splits;
};

Plan plan_of(const GramParams& p) {
    Plan plan{};
    plan.panels = ceil_div(p.channels, kTile);
    plan.pairs = plan.panels * (plan.panels + 1) / 2;
    plan.steps_per_image = ceil_div(p.height * p.width, kDepth);
    plan.steps = p.batch * plan.steps_per_image;
    const int64_t wanted = ceil_div(kBlocks, plan.pairs), most = ceil_div(plan.steps, 8);
    plan.splits = wanted < most ? wanted : most;
    plan.splits = plan.splits < 1 ? 1 : plan.splits;
    return plan;
}

struct PanelPair {
    int i, j;

    __device__ __forceinline__ explicit PanelPair(int number) {
        i = static_cast<int>((sqrtf(8.0f * static_cast<float>(number) + 1.0f) - 1.0f) * 0.5f);
        while ((i + 1) * (i + 2) / 2 <= number) ++i;
        while (i * (i + 1) / 2 > number) --i;
        j = number - i * (i + 1) / 2;
    }
};

// rows[c][k] = scaled value of channel panel * kTile + c at position first + k; zero outside. Lanes run along the
// contiguous axis.
template <typename T>
__device__ __forceinline__ void fill(const GramParams& p, const T* maps, int64_t n, int64_t first, int panel,
                                     float* rows) {
    const bool by_channel = p.stride_c < p.stride_w;
    const int64_t positions = p.height * p.width;
    for (int at = threadIdx.x; at < kTile * kDepth; at += kThreads) {
        const int c = by_channel ? at % kTile : at / kDepth, k = by_channel ? at / kTile : at % kDepth;
        const int64_t channel = panel * int64_t{kTile} + c, position = first + k;
        float value = 0.0f;
        if (channel < p.channels && position < positions) {
            const int64_t y = position / p.width, x = position % p.width;
            value = load(maps + n * p.stride_n + channel * p.stride_c + y * p.stride_h + x * p.stride_w);
            if (p.means) value -= p.means[channel];
            if (p.norms) value /= p.norms[n * p.channels + channel];
        }
        rows[c * kPitch + k] = value;
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

using Left = wmma::fragment<wmma::matrix_a, 16, 16, 8, wmma::precision::tf32, wmma::row_major>;
using Right = wmma::fragment<wmma::matrix_b, 16, 16, 8, wmma::precision::tf32, wmma::col_major>;
using Sums = wmma::fragment<wmma::accumulator, 16, 16, 8, float>;

__device__ __forceinline__ void multiply(const float* left, const float* right, Sums (&sums)[2][2]) {
    for (int k = 0; k < kDepth; k += 8) {
        Left left_high[2], left_low[2];
        Right right_high[2], right_low[2];
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            wmma::load_matrix_sync(left_high[t], left + t * 16 * kPitch + k, kPitch);
            wmma::load_matrix_sync(right_high[t], right + t * 16 * kPitch + k, kPitch);
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
}

template <typename T>
__global__ void __launch_bounds__(kThreads) partial_tiles(GramParams p, const T* maps, Plan plan) {
    __shared__ __align__(128) float left[kTile * kPitch], right[kTile * kPitch];
    const PanelPair pair(static_cast<int>(blockIdx.x));
    const int64_t first = plan.steps * blockIdx.y / plan.splits, last = plan.steps * (blockIdx.y + 1) / plan.splits;
    const int warp = threadIdx.x / 32, row = warp / 2 * 32, column = warp % 2 * 32;
    Sums sums[2][2];
    for (auto& line : sums)
        for (auto& sum : line) wmma::fill_fragment(sum, 0.0f);
    const float* other = pair.i == pair.j ? left : right;
    for (int64_t step = first; step < last; ++step) {
        const int64_t n = step / plan.steps_per_image, position = step % plan.steps_per_image * kDepth;
        fill(p, maps, n, position, pair.i, left);
        if (pair.i != pair.j) fill(p, maps, n, position, pair.j, right);
        __syncthreads();
        multiply(left + row * kPitch, other + column * kPitch, sums);
        __syncthreads();
    }
    float* out = p.workspace + (blockIdx.y * plan.pairs + blockIdx.x) * kTileSize + row * kTile + column;
    for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j)
            wmma::store_matrix_sync(out + i * 16 * kTile + j * 16, sums[i][j], kTile, wmma::mem_row_major);
}

// Sums the partial tiles of one pair of panels and adds them, and their mirror image, to the matrix.
__global__ void __launch_bounds__(kThreads) add_tiles(GramParams p, Plan plan) {
    const PanelPair pair(static_cast<int>(blockIdx.x));
    for (int at = threadIdx.x; at < kTileSize; at += kThreads) {
        const int64_t i = pair.i * int64_t{kTile} + at / kTile, j = pair.j * int64_t{kTile} + at % kTile;
        if (i >= p.channels || j > i) continue;
        float sum = 0.0f;
        for (int64_t s = 0; s < plan.splits; ++s) sum += p.workspace[(s * plan.pairs + blockIdx.x) * kTileSize + at];
        const float total = p.total[i * p.channels + j] + sum;
        p.total[i * p.channels + j] = total;
        p.total[j * p.channels + i] = total;
    }
}

}  // namespace

int64_t gram_workspace_cuda(const GramParams& p) {
    const Plan plan = plan_of(p);
    return plan.splits * plan.pairs * kTileSize;
}

Status gram_cuda(const GramParams& p, CUstream_st* stream) {
    const Plan plan = plan_of(p);
    if (p.channels < 1 || p.height * p.width < 1 || plan.splits > 65535) return Status::bad_argument;
    const auto pairs = static_cast<unsigned>(plan.pairs);
    visit_dtype(p.maps, p.dtype, [&](auto* maps) {
        partial_tiles<<<dim3(pairs, static_cast<unsigned>(plan.splits)), kThreads, 0, stream>>>(p, maps, plan);
    });
    if (const Status status = launch_status(); status != Status::ok) return status;
    add_tiles<<<pairs, kThreads, 0, stream>>>(p, plan);
    return launch_status();
}

}  // namespace vss
