// CPU: a task is a range of channels of one tensor. Where the channel axis is the first, a channel is one contiguous
// run. Elsewhere the range's elements of every outer index are a run: runs are added element by element, then each
// channel's share is summed. Runs of 16-bit values are turned into floats first.
#include "weight_reduce.h"

#include <algorithm>
#include <cmath>

namespace vss {
namespace {

// What one element contributes.
template <Reduce Mode>
inline __attribute__((always_inline)) float term(float weight, float grad) {
    if constexpr (Mode == Reduce::l1) return std::fabs(weight);
    if constexpr (Mode == Reduce::l2) return weight * weight;
    if constexpr (Mode == Reduce::product) return weight * grad;
    return std::fabs(weight * grad);
}

template <Reduce Mode>
inline __attribute__((always_inline)) float sum_terms(const float* weight, const float* grad, int64_t count) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += term<Mode>(weight[i], Mode < Reduce::product ? 0.0f : grad[i]);
    return sum;
}

template <Reduce Mode>
inline __attribute__((always_inline)) void add_terms(const float* __restrict weight, const float* __restrict grad,
                                                     int64_t count, float* __restrict sums) {
    for (int64_t i = 0; i < count; ++i) sums[i] += term<Mode>(weight[i], Mode < Reduce::product ? 0.0f : grad[i]);
}

VSS_CLONES float sum_run(Reduce mode, const float* weight, const float* grad, int64_t count) {
    switch (mode) {
        case Reduce::l1:
            return sum_terms<Reduce::l1>(weight, grad, count);
        case Reduce::l2:
            return sum_terms<Reduce::l2>(weight, grad, count);
        case Reduce::product:
            return sum_terms<Reduce::product>(weight, grad, count);
        case Reduce::abs_product:
            return sum_terms<Reduce::abs_product>(weight, grad, count);
    }
    return 0.0f;
}

VSS_CLONES void add_run(Reduce mode, const float* weight, const float* grad, int64_t count, float* sums) {
    switch (mode) {
        case Reduce::l1:
            return add_terms<Reduce::l1>(weight, grad, count, sums);
        case Reduce::l2:
            return add_terms<Reduce::l2>(weight, grad, count, sums);
        case Reduce::product:
            return add_terms<Reduce::product>(weight, grad, count, sums);
        case Reduce::abs_product:
            return add_terms<Reduce::abs_product>(weight, grad, count, sums);
    }
}

// Pieces of at most kReduceChunk elements as floats: in place for float, through a buffer for the 16-bit types.
inline const float* as_floats(const float* values, int64_t, float*) {
    return values;
}

template <typename T>
const float* as_floats(const T* values, int64_t count, float* buffer) {
    for (int64_t i = 0; i < count; ++i) buffer[i] = to_float(values[i]);
    return buffer;
}

template <typename T>
struct Task {
    const WeightReduceParams& p;
    const ReduceTensor& tensor;
    float weight_buffer[kReduceChunk], grad_buffer[kReduceChunk];  // left as they are: filled before they are read

    Task(const WeightReduceParams& params, const ReduceTensor& reduced) : p(params), tensor(reduced) {}

    // Calls visit(offset in the run, weights, gradients, count) piece by piece.
    template <typename Visit>
    void pieces(int64_t start, int64_t count, const Visit& visit) {
        const T* weight = static_cast<const T*>(tensor.weight) + start;
        const T* grad = tensor.grad ? static_cast<const T*>(tensor.grad) + start : nullptr;
        for (int64_t at = 0; at < count; at += kReduceChunk) {
            const int64_t length = std::min(kReduceChunk, count - at);
            const float* g = grad ? as_floats(grad + at, length, grad_buffer) : nullptr;
            visit(at, as_floats(weight + at, length, weight_buffer), g, length);
        }
    }

    void store(int64_t channel, double sum) const {
        tensor.sums[channel] = static_cast<float>(p.mode == Reduce::l2 ? std::sqrt(sum) : sum);
    }

    // Every channel is one run per outer index.
    void by_channel(int64_t first, int64_t last) {
        for (int64_t c = first; c < last; ++c) {
            double sum = 0.0;
            for (int64_t o = 0; o < tensor.outer; ++o) {
                pieces((o * tensor.channels + c) * tensor.inner, tensor.inner,
                       [&](int64_t, const float* w, const float* g, int64_t n) {
                           sum += static_cast<double>(sum_run(p.mode, w, g, n));
                       });
            }
            store(c, sum);
        }
    }

    // The range is one run of at most kReduceChunk elements per outer index.
    void by_element(int64_t first, int64_t last) {
        float sums[kReduceChunk] = {};
        const int64_t count = (last - first) * tensor.inner;
        for (int64_t o = 0; o < tensor.outer; ++o) {
            pieces((o * tensor.channels + first) * tensor.inner, count,
                   [&](int64_t, const float* w, const float* g, int64_t n) { add_run(p.mode, w, g, n, sums); });
        }
        for (int64_t c = first; c < last; ++c) {
            const float* share = sums + (c - first) * tensor.inner;
            double sum = 0.0;
            for (int64_t i = 0; i < tensor.inner; ++i) sum += static_cast<double>(share[i]);
            store(c, sum);
        }
    }
};

template <typename T>
void run(const WeightReduceParams& p) {
#pragma omp parallel for schedule(dynamic) num_threads(p.threads) if (p.threads > 1 && p.task_count > 1)
    for (int64_t i = 0; i < p.task_count; ++i) {
        const ReduceTask& task = p.tasks[i];
        Task<T> work(p, p.tensors[task.tensor]);
        const bool short_runs = work.tensor.outer > 1 && (task.last - task.first) * work.tensor.inner <= kReduceChunk;
        short_runs ? work.by_element(task.first, task.last) : work.by_channel(task.first, task.last);
    }
}

}  // namespace

Status weight_reduce_cpu(const WeightReduceParams& p) {
    if (p.threads < 1) return Status::bad_argument;
    return by_dtype(p.dtype, [&](auto element) { run<decltype(element)>(p); });
}

}  // namespace vss
