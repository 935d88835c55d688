// The few words a kernel test needs: random values from a seed, and a check that counts failures.
#pragma once

#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

namespace vss::test {

inline int failures = 0;

inline void check(bool condition, const char* what, long long a = 0, long long b = 0) {
    if (condition) return;
    if (++failures <= 20) std::fprintf(stderr, "failed: %s (%lld, %lld)\n", what, a, b);
}

inline std::vector<float> normal(size_t count, uint32_t seed) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> draw;
    std::vector<float> values(count);
    for (float& value : values) value = draw(engine);
    return values;
}

inline int result() {
    if (failures > 0) std::fprintf(stderr, "%d checks failed\n", failures);
    return failures == 0 ? 0 : 1;
}

}  // namespace vss::test
