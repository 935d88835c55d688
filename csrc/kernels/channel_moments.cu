// CUDA: lanes run along the contiguous axis of the activation: a block per map (lanes are positions), or a block per 32
// channels (lanes are channels, warps share out positions) for channels_last. Sums beyond a thread are double.
#include "channel_moments_tile.h"
#include "common.cuh"

namespace vss {
namespace {

constexpr int64_t kMaxBlocks = 2147483647;

using Sums = MomentSums<float>;

template <typename T>
__device__ __forceinline__ void add(const ChannelMomentsParams& p, const T* a, const T* g, int64_t n, int64_t c,
                                    int64_t position, Sums& sums) {
    const float weight = p.mask ? load(p.mask + n * p.height * p.width + position) : 1.0f;
    const float value = load(a + moment_offset(p.stride_a, n, c, position, p.width));
    add_moment(sums, value, load(g + moment_offset(p.stride_g, n, c, position, p.width)), weight);
}

template <typename T>
__global__ void __launch_bounds__(kMomentThreads) position_lanes(ChannelMomentsParams p, const T* a, const T* g) {
    const int64_t n = blockIdx.x / p.channels, c = blockIdx.x % p.channels;
    Sums sums{};
    for (int64_t at = threadIdx.x; at < p.height * p.width; at += kMomentThreads) add(p, a, g, n, c, at, sums);
    __shared__ Sums parts[kMomentThreads];
    parts[threadIdx.x] = sums;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    MomentSums<double> sum = lane_total(parts, static_cast<int>(threadIdx.x));
    for (int step = 16; step > 0; step /= 2) {
        sum.product += __shfl_down_sync(0xffffffffu, sum.product, step);
        sum.abs_product += __shfl_down_sync(0xffffffffu, sum.abs_product, step);
        sum.abs_activation += __shfl_down_sync(0xffffffffu, sum.abs_activation, step);
        sum.gradient += __shfl_down_sync(0xffffffffu, sum.gradient, step);
    }
    if (threadIdx.x == 0) sum.store(p.moments + blockIdx.x * int64_t{kChannelMoments});
}

template <typename T>
__global__ void __launch_bounds__(kMomentThreads) channel_lanes(ChannelMomentsParams p, const T* a, const T* g) {
    const int64_t groups = ceil_div(p.channels, 32), n = blockIdx.x / groups;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t c = blockIdx.x % groups * 32 + lane;
    Sums sums{};
    if (c < p.channels) {
        for (int64_t at = warp; at < p.height * p.width; at += kMomentWarps) add(p, a, g, n, c, at, sums);
    }
    __shared__ Sums parts[kMomentThreads];
    parts[threadIdx.x] = sums;
    __syncthreads();
    if (warp > 0 || c >= p.channels) return;
    lane_total(parts, lane).store(p.moments + (n * p.channels + c) * kChannelMoments);
}

}  // namespace

Status channel_moments_cuda(const ChannelMomentsParams& p, CUstream_st* stream) {
    if (p.batch * p.channels > kMaxBlocks) return Status::bad_argument;
    if (p.batch * p.channels == 0) return Status::ok;
    visit_dtype(p.activation, p.dtype, [&](auto* a) {
        const auto* g = static_cast<decltype(a)>(p.gradient);
        if (moments_by_channel(p)) {
            const auto blocks = static_cast<unsigned>(p.batch * ceil_div(p.channels, 32));
            channel_lanes<<<blocks, kMomentThreads, 0, stream>>>(p, a, g);
        } else {
            position_lanes<<<static_cast<unsigned>(p.batch * p.channels), kMomentThreads, 0, stream>>>(p, a, g);
        }
    });
    return launch_status();
}

}  // namespace vss
