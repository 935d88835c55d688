// CPU: a thread takes a group of neighbouring maps, row by row. Contiguous float rows are read where they lie; others
// go through small buffers, filled for the whole group at once so that channels_last is read in whole cache lines.
#include "channel_moments.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace vss {
namespace {

constexpr int64_t kGroup = 16;

VSS_CLONES void add_row(const float* a, const float* g, const float* mask, int64_t width, MomentSums<double>* sums) {
    float product = 0.0f, abs_product = 0.0f, abs_activation = 0.0f, gradient = 0.0f;
    if (mask) {
#pragma omp simd reduction(+ : product, abs_product, abs_activation, gradient)
        for (int64_t x = 0; x < width; ++x) {
            const float both = a[x] * g[x], weight = mask[x];
            product += both * weight;
            abs_product += std::fabs(both) * weight;
            abs_activation += std::fabs(a[x]) * weight;
            gradient += g[x] * weight;
        }
    } else {
#pragma omp simd reduction(+ : product, abs_product, abs_activation, gradient)
        for (int64_t x = 0; x < width; ++x) {
            const float both = a[x] * g[x];
            product += both;
            abs_product += std::fabs(both);
            abs_activation += std::fabs(a[x]);
            gradient += g[x];
        }
    }
    sums->product += static_cast<double>(product);
    sums->abs_product += static_cast<double>(abs_product);
    sums->abs_activation += static_cast<double>(abs_activation);
    sums->gradient += static_cast<double>(gradient);
}

// One row of each map of a group: rows[c], `pitch` apart.
struct Rows {
    const float* first;
    int64_t pitch;
};

template <typename T>
Rows rows_of(const void* data, const int64_t (&stride)[4], int64_t n, int64_t c0, int64_t maps, int64_t y,
             int64_t width, float* buffer) {
    const T* source = static_cast<const T*>(data) + n * stride[0] + c0 * stride[1] + y * stride[2];
    if constexpr (std::is_same_v<T, float>) {
        if (stride[3] == 1 || width == 1) return {source, stride[1]};
    }
    if (stride[1] < stride[3]) {
        for (int64_t x = 0; x < width; ++x)
            for (int64_t c = 0; c < maps; ++c) buffer[c * width + x] = to_float(source[x * stride[3] + c * stride[1]]);
    } else {
        for (int64_t c = 0; c < maps; ++c)
            for (int64_t x = 0; x < width; ++x) buffer[c * width + x] = to_float(source[x * stride[3] + c * stride[1]]);
    }
    return {buffer, width};
}

template <typename T>
void group(const ChannelMomentsParams& p, int64_t n, int64_t c0, float* buffer) {
    const int64_t maps = std::min(kGroup, p.channels - c0);
    MomentSums<double> sums[kGroup] = {};
    for (int64_t y = 0; y < p.height; ++y) {
        const Rows a = rows_of<T>(p.activation, p.stride_a, n, c0, maps, y, p.width, buffer);
        const Rows g = rows_of<T>(p.gradient, p.stride_g, n, c0, maps, y, p.width, buffer + kGroup * p.width);
        const float* mask = p.mask ? p.mask + (n * p.height + y) * p.width : nullptr;
        for (int64_t c = 0; c < maps; ++c)
            add_row(a.first + c * a.pitch, g.first + c * g.pitch, mask, p.width, &sums[c]);
    }
    for (int64_t c = 0; c < maps; ++c) sums[c].store(p.moments + (n * p.channels + c0 + c) * kChannelMoments);
}

template <typename T>
void run(const ChannelMomentsParams& p) {
    const int64_t groups = ceil_div(p.channels, kGroup), tasks = p.batch * groups;
#pragma omp parallel for schedule(dynamic) num_threads(p.threads) if (p.threads > 1 && tasks > 1)
    for (int64_t task = 0; task < tasks; ++task) {
        group<T>(p, task / groups, task % groups * kGroup, p.workspace + thread_index() * 2 * kGroup * p.width);
    }
}

}  // namespace

int64_t channel_moments_workspace(const ChannelMomentsParams& p) {
    return p.threads * 2 * kGroup * p.width;
}

Status channel_moments_cpu(const ChannelMomentsParams& p) {
    if (p.threads < 1) return Status::bad_argument;
    return by_dtype(p.dtype, [&](auto element) { run<decltype(element)>(p); });
}

}  // namespace vss
