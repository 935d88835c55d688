// CUDA's language on the host, for tests: this folder stands in for the toolkit's headers, so that a test includes a
// .cu file as it is and calls its launcher. A thread of a block is a fiber that runs until it reaches a barrier or a
// shuffle; blocks run one after the other. The order in which threads run is a choice (`order`), so that a missing
// barrier changes results; threads that wait at different barriers end the test.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))

struct CUstream_st;

struct dim3 {
    unsigned x, y, z;
    explicit dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(4) uchar4 {
    unsigned char x, y, z, w;
};
inline uchar4 make_uchar4(int x, int y, int z, int w) {
    const auto byte = [](int value) { return static_cast<unsigned char>(value); };
    return {byte(x), byte(y), byte(z), byte(w)};
}
struct alignas(16) int4 {
    int x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) {
    return {x, y, z, w};
}

enum cudaError_t {
    cudaSuccess,
    cudaErrorNoKernelImageForDevice,
    cudaErrorIllegalAddress,
    cudaErrorLaunchFailure,
    cudaErrorLaunchTimeout,
    cudaErrorAssert,
    cudaErrorHardwareStackError,
    cudaErrorIllegalInstruction,
    cudaErrorMisalignedAddress,
    cudaErrorInvalidAddressSpace,
    cudaErrorInvalidPc,
    cudaErrorECCUncorrectable
};

#define VSS_CUDA_ON_HOST

namespace vss::test {

enum class Order { up, down, shuffled };
inline Order order = Order::up;
inline cudaError_t next_launch = cudaSuccess;  // what the next launch shall report

enum class Wait { none, block, warp, done };

struct Fiber {
    ucontext_t context;
    Wait wait;
};

constexpr size_t kStack = size_t{128} << 10;
constexpr unsigned kMostThreads = 1024;
inline std::vector<Fiber> fibers(kMostThreads);
inline std::vector<std::unique_ptr<char[]>> stacks(kMostThreads);
inline ucontext_t scheduler;
inline std::function<void()> body;
inline unsigned running;
inline uint64_t slots[kMostThreads];  // what the lanes of a shuffle hand over

inline void stop(Wait wait) {
    const unsigned self = running;
    fibers[self].wait = wait;
    swapcontext(&fibers[self].context, &scheduler);
}

inline void fiber_main() {
    body();
    fibers[running].wait = Wait::done;
}

// Lets the threads go on that wait together; whether there are any, or all are done.
inline bool release(unsigned threads) {
    const auto all = [&](unsigned first, unsigned last, Wait wait) {
        bool some = false;
        for (unsigned t = first; t < last; ++t) {
            if (fibers[t].wait != wait && fibers[t].wait != Wait::done) return false;
            some = some || fibers[t].wait == wait;
        }
        return some;
    };
    const auto go = [&](unsigned first, unsigned last, Wait wait) {
        if (!all(first, last, wait)) return false;
        for (unsigned t = first; t < last; ++t)
            if (fibers[t].wait == wait) fibers[t].wait = Wait::none;
        return true;
    };
    bool any = go(0, threads, Wait::block);
    for (unsigned first = 0; first < threads; first += 32) any = go(first, first + 32, Wait::warp) || any;
    return any || std::all_of(fibers.begin(), fibers.begin() + threads, [](auto& f) { return f.wait == Wait::done; });
}

inline void run_block(unsigned threads, std::mt19937& random) {
    std::vector<unsigned> turn(threads);
    for (unsigned t = 0; t < threads; ++t) turn[t] = order == Order::down ? threads - 1 - t : t;
    for (unsigned t = 0; t < threads; ++t) {
        if (!stacks[t]) stacks[t].reset(new char[kStack]);
        getcontext(&fibers[t].context);
        fibers[t].context.uc_stack.ss_sp = stacks[t].get();
        fibers[t].context.uc_stack.ss_size = kStack;
        fibers[t].context.uc_link = &scheduler;
        makecontext(&fibers[t].context, fiber_main, 0);
        fibers[t].wait = Wait::none;
    }
    for (bool left = true; left;) {
        if (order == Order::shuffled) std::shuffle(turn.begin(), turn.end(), random);
        for (const unsigned t : turn) {
            if (fibers[t].wait != Wait::none) continue;
            running = t;
            threadIdx.x = t;
            swapcontext(&scheduler, &fibers[t].context);
        }
        left = std::any_of(fibers.begin(), fibers.begin() + threads, [](auto& f) { return f.wait != Wait::done; });
        if (!release(threads)) {
            std::fprintf(stderr, "threads of block %u wait at different barriers\n", blockIdx.x);
            std::abort();
        }
    }
}

template <typename T>
T exchange(T value, unsigned lane) {
    std::memcpy(&slots[running], &value, sizeof value);
    stop(Wait::warp);
    std::memcpy(&value, &slots[running / 32 * 32 + lane], sizeof value);
    stop(Wait::warp);
    return value;
}

template <typename... Given, size_t... Index>
void run_grid(void (*kernel)(Given...), void** arguments, std::index_sequence<Index...>) {
    std::mt19937 random(1);
    body = [&] { kernel(*static_cast<Given*>(arguments[Index])...); };
    for (unsigned block = 0; block < gridDim.x; ++block) {
        blockIdx.x = block;
        run_block(blockDim.x, random);
    }
}

}  // namespace vss::test

inline void __syncthreads() {
    vss::test::stop(vss::test::Wait::block);
}

template <typename T>
T __ldg(const T* at) {
    return *at;
}

// All 32 lanes take part; a lane without a partner keeps its own value, as on a device.
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned step) {
    const unsigned lane = vss::test::running % 32;
    return vss::test::exchange(value, lane + step < 32 ? lane + step : lane);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned step) {
    const unsigned lane = vss::test::running % 32;
    return vss::test::exchange(value, lane >= step ? lane - step : lane);
}

template <typename... Given>
cudaError_t cudaLaunchKernel(void (*kernel)(Given...), dim3 grid, dim3 block, void** arguments, size_t, CUstream_st*) {
    if (const cudaError_t error = std::exchange(vss::test::next_launch, cudaSuccess)) return error;
    gridDim = grid, blockDim = block;
    vss::test::run_grid(kernel, arguments, std::index_sequence_for<Given...>{});
    return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorIllegalAddress ? "an illegal memory access was encountered" : "no kernel image";
}
