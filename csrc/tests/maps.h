// Maps for the kernel tests: values known by their four indices, stored in any layout and element type, exactly.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>

#include "check.h"
#include "common.h"

namespace vss::test {

enum class Layout { contiguous, channels_last, strided, transposed };

using Sizes = std::array<int64_t, 4>;  // n, c, h, w

struct Maps {
    Sizes sizes;
    int64_t stride[4];
    DType dtype;
    std::vector<float> values;  // n, c, h, w, contiguous
    std::vector<uint8_t> storage;

    Maps(const Sizes& shape, Layout layout, DType type, uint32_t seed) : sizes(shape), dtype(type) {
        const auto [n, c, h, w] = shape;
        values = normal(static_cast<size_t>(n * c * h * w), seed);
        if (type != DType::f32)
            for (float& value : values) value = narrow(value);
        const int64_t contiguous[4] = {c * h * w, h * w, w, 1}, last[4] = {c * h * w, 1, w * c, c},
                      strided[4] = {2 * c * h * w, 4 * h * w, 4 * w, 2}, transposed[4] = {c * h * w, h * w, 1, h};
        const int64_t (*all[])[4] = {&contiguous, &last, &strided, &transposed};
        std::copy_n(*all[static_cast<int>(layout)], 4, stride);
        if (layout == Layout::strided) stride[0] = 4 * c * h * w;
        storage.assign(static_cast<size_t>(4 * n * c * h * w + 4) * size(), 0xff);  // not a number, between the values
        store();
    }

    size_t size() const { return dtype == DType::f32 ? 4 : 2; }
    const void* data() const { return storage.data(); }
    size_t count() const { return values.size(); }
    float at(int64_t n, int64_t c, int64_t y, int64_t x) const {
        return values[static_cast<size_t>(((n * sizes[1] + c) * sizes[2] + y) * sizes[3] + x)];
    }

    // Writes `values` to their places.
    void store() {
        size_t i = 0;
        for (int64_t n = 0; n < sizes[0]; ++n)
            for (int64_t c = 0; c < sizes[1]; ++c)
                for (int64_t y = 0; y < sizes[2]; ++y)
                    for (int64_t x = 0; x < sizes[3]; ++x)
                        put(n * stride[0] + c * stride[1] + y * stride[2] + x * stride[3], values[i++]);
    }

  private:
    // Rounded so that float16 and bfloat16 hold it.
    static float narrow(float value) {
        return std::fabs(value) < 0x1p-10f ? 0.0f : bits_to_float(float_to_bits(value) & 0xffff0000u);
    }

    void put(int64_t at, float value) {
        uint8_t* to = storage.data() + static_cast<size_t>(at) * size();
        const uint32_t bits = float_to_bits(value);
        if (dtype == DType::f32) {
            std::memcpy(to, &value, 4);
            return;
        }
        uint32_t half = bits >> 16;
        if (dtype == DType::f16) {
            const uint32_t rest = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
            half = sign | (rest == 0 ? 0 : rest > 0x7f800000u ? 0x7e00u : (rest - (112u << 23)) >> 13);
        }
        const auto narrowed = static_cast<uint16_t>(half);
        std::memcpy(to, &narrowed, 2);
    }
};

#if defined(VSS_CUDA_ON_HOST)
// Runs the CUDA launcher `call` with threads in three orders; `result` must be the same to the bit each time.
inline void in_every_order(std::vector<float>& result, const std::function<Status()>& call) {
    std::vector<float> first;
    for (const Order each : {Order::up, Order::down, Order::shuffled}) {
        order = each;
        const std::vector<float> before = result;
        const Status status = call();
        check(status == Status::ok, "CUDA status", status.code);
        if (first.empty()) {
            first = result;
        } else if (result.size() > 0) {
            check(std::memcmp(first.data(), result.data(), result.size() * sizeof(float)) == 0,
                  "the order of threads changes the result", static_cast<int>(each));
        }
        if (each != Order::shuffled) result = before;
    }
}
#endif

}  // namespace vss::test
