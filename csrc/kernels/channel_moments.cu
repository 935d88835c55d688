// CUDA: lanes run along the contiguous axis of the activation, positions, or channels for channels_last. Each block
// takes a share of the positions of one map or of 32 channels; addresses are walked without a division. A thread adds
// up to kMomentMostFloats positions in float; everything after that is double.
#include <cmath>

#include "channel_moments_tile.h"
#include "common.cuh"

namespace vss {
namespace {

using Sums = MomentSums<float>;
using Totals = MomentSums<double>;

// Sums of one thread over its share of map (n, c).
template <typename T>
__device__ __forceinline__ Sums walk(const ChannelMomentsParams& p, const MomentPlan& plan, const T* a, const T* g,
                                     int64_t n, int64_t c, int64_t split, int thread) {
    Sums sums{};
    const MomentShare share = moment_share(plan, split, thread);
    if (share.count == 0) return sums;
    Walk at_a(share.first, plan.step, plan.width, p.stride_a[2], p.stride_a[3]);
    Walk at_g(share.first, plan.step, plan.width, p.stride_g[2], p.stride_g[3]);
    a += n * p.stride_a[0] + c * p.stride_a[1];
    g += n * p.stride_g[0] + c * p.stride_g[1];
    const float* mask = p.mask ? p.mask + n * plan.positions + share.first : nullptr;
    constexpr int kAhead = 4;  // positions that are fetched before the first of them is needed
    for (int32_t left = share.count; left > 0; left -= kAhead) {
        float value[kAhead], slope[kAhead], weight[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            if (j >= left) break;
            value[j] = load(a + at_a.offset), slope[j] = load(g + at_g.offset);
            weight[j] = mask ? load(mask) : 1.0f;
            at_a.next(), at_g.next();
            if (mask) mask += plan.step;
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            if (j >= left) break;
            const float both = value[j] * slope[j];
            sums.product += both * weight[j];
            sums.abs_product += fabsf(both) * weight[j];
            sums.abs_activation += fabsf(value[j]) * weight[j];
            sums.gradient += slope[j] * weight[j];
        }
    }
    return sums;
}

__device__ __forceinline__ void keep(const ChannelMomentsParams& p, const MomentPlan& plan, int64_t split, int64_t map,
                                     const Totals& total, Totals* parts) {
    if (plan.splits == 1) {
        total.store(p.moments + map * kChannelMoments);
    } else {
        parts[split * p.batch * p.channels + map] = total;
    }
}

template <typename T>
__global__ void __launch_bounds__(kMomentThreads)
    position_lanes(ChannelMomentsParams p, const T* a, const T* g, MomentPlan plan, Totals* parts) {
    const auto splits = static_cast<uint32_t>(plan.splits), channels = static_cast<uint32_t>(p.channels);
    const uint32_t map = blockIdx.x / splits, split = blockIdx.x % splits;
    Totals total{};
    total.add(walk(p, plan, a, g, map / channels, map % channels, split, static_cast<int>(threadIdx.x)));
    add_lanes(total);
    __shared__ Totals partial[kMomentWarps];
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = total;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int w = 1; w < kMomentWarps; ++w) total.add(partial[w]);
    keep(p, plan, split, map, total, parts);
}

template <typename T>
__global__ void __launch_bounds__(kMomentThreads)
    channel_lanes(ChannelMomentsParams p, const T* a, const T* g, MomentPlan plan, Totals* parts) {
    const auto splits = static_cast<uint32_t>(plan.splits), across = static_cast<uint32_t>(ceil_div(p.channels, 32));
    const uint32_t group = blockIdx.x / splits, split = blockIdx.x % splits;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t n = group / across, c = group % across * int64_t{32} + lane;
    __shared__ Sums partial[kMomentWarps][32];
    if (c < p.channels) partial[warp][lane] = walk(p, plan, a, g, n, c, split, warp);
    __syncthreads();
    if (warp > 0 || c >= p.channels) return;
    Totals total{};
    for (int w = 0; w < kMomentWarps; ++w) total.add(partial[w][lane]);
    keep(p, plan, split, n * p.channels + c, total, parts);
}

}  // namespace

int64_t channel_moments_workspace_cuda(const ChannelMomentsParams& p) {
    const MomentPlan plan = moment_plan(p);
    constexpr int64_t kFloats = sizeof(Totals) / sizeof(float);
    return plan.splits > 1 ? plan.splits * p.batch * p.channels * kFloats : 0;
}

Status channel_moments_cuda(const ChannelMomentsParams& p, CUstream_st* stream) {
    if (p.batch * p.channels == 0) return Status::ok;
    const MomentPlan plan = moment_plan(p);
    if (p.batch * p.channels > kMaxBlocks || plan.splits > kMaxBlocks) return Status::bad_argument;
    auto* parts = reinterpret_cast<Totals*>(p.workspace);
    const Status status = visit_dtype(p.activation, p.dtype, [&](auto* a) {
        using T = std::decay_t<decltype(*a)>;
        return launch(plan.by_channel ? channel_lanes<T> : position_lanes<T>, plan.groups * plan.splits, kMomentThreads,
                      stream, p, a, static_cast<const T*>(p.gradient), plan, parts);
    });
    if (status != Status::ok || plan.splits == 1) return status;
    const int64_t maps = p.batch * p.channels;
    return launch(add_parts<Totals>, ceil_div(maps, kAddMaps), kAddThreads, stream, static_cast<const Totals*>(parts),
                  maps, static_cast<int>(plan.splits), p.moments);
}

}  // namespace vss
