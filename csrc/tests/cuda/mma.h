// Stands in for the toolkit's header of this name; see cuda_runtime.h. Lane 0 of a warp holds whole matrices and does
// all of the work; the others pass through.
#pragma once

#include <cmath>
#include <cstring>

#include "cuda_runtime.h"

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
namespace precision {
struct tf32 {};
}  // namespace precision
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
    static constexpr int rows = std::is_same_v<Use, matrix_b> ? K : M;
    static constexpr int columns = std::is_same_v<Use, matrix_a> ? K : N;
    static constexpr int num_elements = rows * columns;
    float x[num_elements] = {};

    static int at(int i, int j, int pitch) { return std::is_same_v<Layout, col_major> ? j * pitch + i : i * pitch + j; }
};

inline bool first_lane() {
    return vss::test::running % 32 == 0;
}

// Rounds to ten bits of mantissa, halves away from zero, as cvt.rna.tf32.f32 does.
inline float __float_to_tf32(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = (bits + 0x1000u) & 0xffffe000u;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <typename Fragment>
void fill_fragment(Fragment& f, float value) {
    for (float& element : f.x) element = value;
}

template <typename Fragment>
void load_matrix_sync(Fragment& f, const float* from, unsigned pitch) {
    if (!first_lane()) return;
    for (int i = 0; i < Fragment::rows; ++i)
        for (int j = 0; j < Fragment::columns; ++j)
            f.x[i * Fragment::columns + j] = from[Fragment::at(i, j, static_cast<int>(pitch))];
}

template <typename Fragment>
void store_matrix_sync(float* to, const Fragment& f, unsigned pitch, layout_t) {
    if (!first_lane()) return;
    for (int i = 0; i < Fragment::rows; ++i)
        for (int j = 0; j < Fragment::columns; ++j)
            to[i * static_cast<int>(pitch) + j] = f.x[i * Fragment::columns + j];
}

// The float next to a sum on the side of zero: tensor cores do not round.
inline float cut_off(double sum) {
    const auto nearest = static_cast<float>(sum);
    return std::fabs(nearest) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

template <typename Sums, typename Left, typename Right>
void mma_sync(Sums& d, const Left& a, const Right& b, const Sums& c) {
    if (!first_lane()) return;
    for (int i = 0; i < Sums::rows; ++i)
        for (int j = 0; j < Sums::columns; ++j) {
            double sum = c.x[i * Sums::columns + j];
            for (int k = 0; k < Left::columns; ++k)
                sum += double{a.x[i * Left::columns + k]} * b.x[k * Right::columns + j];
            d.x[i * Sums::columns + j] = cut_off(sum);
        }
}

}  // namespace nvcuda::wmma
