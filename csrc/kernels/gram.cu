// CUDA: 64x64 tiles of the lower triangle on tensor cores. Factors are split into two TF32 parts and three products are
// summed (the fourth is below float32), so results are as exact as float32. Where the triangle has too few tiles to
// fill the device, positions are split among blocks; partial tiles are summed in a fixed order, so results are
// reproducible.
#include <mma.h>

#include "common.cuh"
#include "gram_tile.h"

namespace vss {
namespace {

using namespace nvcuda;

// rows[c][k] = scaled value of channel panel * kGramTile + c at position first + k; zero outside.
template <typename T>
__device__ __forceinline__ void fill(const GramParams& p, const T* maps, int64_t n, int64_t first, int panel,
                                     float* rows) {
    for (int at = threadIdx.x; at < kGramTile * kGramDepth; at += kGramThreads) {
        const GramElement element = gram_element(p, n, first, panel, at);
        float value = 0.0f;
        if (element.offset >= 0) {
            value = load(maps + element.offset);
            if (p.means) value -= p.means[element.channel];
            if (p.norms) value /= p.norms[n * p.channels + element.channel];
        }
        rows[element.slot] = value;
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
    for (int k = 0; k < kGramDepth; k += 8) {
        Left left_high[2], left_low[2];
        Right right_high[2], right_low[2];
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            wmma::load_matrix_sync(left_high[t], left + t * 16 * kGramPitch + k, kGramPitch);
            wmma::load_matrix_sync(right_high[t], right + t * 16 * kGramPitch + k, kGramPitch);
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
__global__ void __launch_bounds__(kGramThreads) partial_tiles(GramParams p, const T* maps, GramPlan plan) {
    __shared__ __align__(128) float left[kGramTile * kGramPitch], right[kGramTile * kGramPitch];
    const GramPair pair = gram_pair(static_cast<int>(blockIdx.x));
    const int64_t first = gram_first_step(plan, blockIdx.y), last = gram_first_step(plan, blockIdx.y + int64_t{1});
    const int warp = threadIdx.x / 32, row = warp / 2 * 32, column = warp % 2 * 32;
    Sums sums[2][2];
    for (auto& line : sums)
        for (auto& sum : line) wmma::fill_fragment(sum, 0.0f);
    const float* other = pair.i == pair.j ? left : right;
    for (int64_t step = first; step < last; ++step) {
        const int64_t n = step / plan.steps_per_image, position = step % plan.steps_per_image * kGramDepth;
        fill(p, maps, n, position, pair.i, left);
        if (pair.i != pair.j) fill(p, maps, n, position, pair.j, right);
        __syncthreads();
        multiply(left + row * kGramPitch, other + column * kGramPitch, sums);
        __syncthreads();
    }
    float* out = p.workspace + gram_partial(plan, blockIdx.y, blockIdx.x) + row * kGramTile + column;
    for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j)
            wmma::store_matrix_sync(out + i * 16 * kGramTile + j * 16, sums[i][j], kGramTile, wmma::mem_row_major);
}

// Sums the partial tiles of one pair of panels and adds them, and their mirror image, to the matrix.
__global__ void __launch_bounds__(kGramThreads) add_tiles(GramParams p, GramPlan plan) {
    const GramPair pair = gram_pair(static_cast<int>(blockIdx.x));
    for (int at = threadIdx.x; at < kGramTileSize; at += kGramThreads) {
        const int64_t i = pair.i * int64_t{kGramTile} + at / kGramTile,
                      j = pair.j * int64_t{kGramTile} + at % kGramTile;
        if (i >= p.channels || j > i) continue;
        float sum = 0.0f;
        for (int64_t s = 0; s < plan.splits; ++s) sum += p.workspace[gram_partial(plan, s, blockIdx.x) + at];
        const float total = p.total[i * p.channels + j] + sum;
        p.total[i * p.channels + j] = total;
        p.total[j * p.channels + i] = total;
    }
}

}  // namespace

int64_t gram_workspace_cuda(const GramParams& p) {
    const GramPlan plan = gram_plan(p);
    return plan.splits * plan.pairs * kGramTileSize;
}

Status gram_cuda(const GramParams& p, CUstream_st* stream) {
    const GramPlan plan = gram_plan(p);
    if (p.channels < 1 || p.height * p.width < 1 || plan.splits > 65535) return Status::bad_argument;
    const auto pairs = static_cast<unsigned>(plan.pairs);
    visit_dtype(p.maps, p.dtype, [&](auto* maps) {
        partial_tiles<<<dim3(pairs, static_cast<unsigned>(plan.splits)), kGramThreads, 0, stream>>>(p, maps, plan);
    });
    if (const Status status = launch_status(); status != Status::ok) return status;
    add_tiles<<<pairs, kGramThreads, 0, stream>>>(p, plan);
    return launch_status();
}

}  // namespace vss
