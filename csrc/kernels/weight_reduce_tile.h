// Index arithmetic of the CUDA weight reduction, apart from it so that the host tests run the very same functions.
#pragma once

#include "weight_reduce.h"

namespace vss {

constexpr int kReduceThreads = 256;
constexpr int kReduceWarps = kReduceThreads / 32;

// Short runs that repeat along the outer axis: a thread per element of the run; else a warp per channel.
VSS_HD bool reduce_by_element(const ReduceTensor& t, const ReduceTask& task) {
    return t.outer > 1 && (task.last - task.first) * t.inner <= kReduceChunk;
}

// Offset of element 0 of channel c at outer index o.
VSS_HD int64_t reduce_start(const ReduceTensor& t, int64_t o, int64_t c) {
    return (o * t.channels + c) * t.inner;
}

// Elements of a task's run at one outer index.
VSS_HD int64_t reduce_run(const ReduceTensor& t, const ReduceTask& task) {
    return (task.last - task.first) * t.inner;
}

}  // namespace vss
