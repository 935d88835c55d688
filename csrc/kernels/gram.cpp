// CPU: positions are taken in slices. All channels of a slice are packed once, scaled and as floats, into panels of
// `kPanel` channels (position-major); each tile of the triangle is then a product of two panels in registers. The panel
// serves as left operand (broadcast) and as right operand (vector), so nothing is packed twice.
#include "gram.h"

#include <algorithm>

namespace vss {
namespace {

constexpr int kPanel = 32;   // channels of a panel
constexpr int kSlice = 256;  // positions of a slice: a packed panel is 32 KiB

// Vectors of floats; moved by memcpy, since they may start anywhere in a float array.
template <int Lanes>
struct VectorOf;
template <>
struct VectorOf<4> {
    typedef float Type __attribute__((vector_size(16)));
};
template <>
struct VectorOf<8> {
    typedef float Type __attribute__((vector_size(32)));
};
template <>
struct VectorOf<16> {
    typedef float Type __attribute__((vector_size(64)));
};

// out[i][j] += sum over p of left[p][row + i] * right[p][j] for Rows by Columns, sums in registers.
template <int Rows, int Columns, int Lanes>
inline __attribute__((always_inline)) void micro(const float* left, const float* right, int64_t positions, float* out) {
    using Vector = typename VectorOf<Lanes>::Type;
    constexpr int kVectors = Columns / Lanes;
    Vector sums[Rows][kVectors] = {};
    for (int64_t p = 0; p < positions; ++p) {
        Vector vectors[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) std::memcpy(&vectors[v], right + p * kPanel + v * Lanes, sizeof(Vector));
#pragma GCC unroll 8
        for (int i = 0; i < Rows; ++i) {
            const float factor = left[p * kPanel + i];
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) sums[i][v] += factor * vectors[v];
        }
    }
    // Unrolled too: the sums stay in registers only if every index is a constant.
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            float* at = out + i * kPanel + v * Lanes;
            Vector total;
            std::memcpy(&total, at, sizeof total);
            total += sums[i][v];
            std::memcpy(at, &total, sizeof total);
        }
    }
}

using Tile = void (*)(const float* left, const float* right, int64_t positions, float* out);

template <int Rows, int Columns, int Lanes>
inline __attribute__((always_inline)) void tile(const float* left, const float* right, int64_t positions, float* out) {
    for (int column = 0; column < kPanel; column += Columns) {
        for (int row = 0; row < kPanel; row += Rows) {
            micro<Rows, Columns, Lanes>(left + row, right + column, positions, out + row * kPanel + column);
        }
    }
}

// Register tiles for 32, 16 and 16 vector registers.
#if VSS_HAS_CLONES
__attribute__((target("avx512f"))) void tile_avx512(const float* left, const float* right, int64_t n, float* out) {
    tile<8, 32, 16>(left, right, n, out);
}
__attribute__((target("avx2,fma"))) void tile_avx2(const float* left, const float* right, int64_t n, float* out) {
    tile<4, 16, 8>(left, right, n, out);
}
#endif
void tile_baseline(const float* left, const float* right, int64_t n, float* out) {
    tile<4, 8, 4>(left, right, n, out);
}

Tile best_tile() {
#if VSS_HAS_CLONES
    if (__builtin_cpu_supports("avx512f")) return tile_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return tile_avx2;
#endif
    return tile_baseline;
}

// Positions first..first + count of image n, the same slice for every channel.
struct Slice {
    int64_t n, first, count;
};

// packed[p][j] = (x[n, panel * kPanel + j, first + p] - mean) / norm; channels past the last are 0.
template <typename T>
void pack_panel(const GramParams& p, const Slice& slice, int64_t panel, float* packed) {
    const int64_t first_channel = panel * kPanel, channels = std::min<int64_t>(kPanel, p.channels - first_channel);
    const T* image = static_cast<const T*>(p.maps) + slice.n * p.stride_n + first_channel * p.stride_c;
    float scale[kPanel] = {}, mean[kPanel] = {};
    for (int64_t j = 0; j < channels; ++j) {
        scale[j] = p.norms ? 1.0f / p.norms[slice.n * p.channels + first_channel + j] : 1.0f;
        mean[j] = p.means ? p.means[first_channel + j] : 0.0f;
    }
    if (channels < kPanel) std::fill(packed, packed + slice.count * kPanel, 0.0f);
    int64_t y = slice.first / p.width, x = slice.first % p.width;
    for (int64_t i = 0; i < slice.count; ++i) {
        const T* source = image + y * p.stride_h + x * p.stride_w;
        float* row = packed + i * kPanel;
        for (int64_t j = 0; j < channels; ++j) row[j] = (to_float(source[j * p.stride_c]) - mean[j]) * scale[j];
        if (++x == p.width) x = 0, ++y;
    }
}

// Adds one tile of the triangle to the matrix, and its mirror image.
void add_tile(const GramParams& p, int64_t panel_i, int64_t panel_j, const float* sums) {
    const int64_t i0 = panel_i * kPanel, j0 = panel_j * kPanel;
    const int64_t rows = std::min<int64_t>(kPanel, p.channels - i0),
                  columns = std::min<int64_t>(kPanel, p.channels - j0);
    for (int64_t i = 0; i < rows; ++i) {
        float* row = p.total + (i0 + i) * p.channels + j0;
        for (int64_t j = 0; j < columns; ++j) row[j] += sums[i * kPanel + j];
    }
    if (panel_i == panel_j) return;
    for (int64_t j = 0; j < columns; ++j) {
        float* row = p.total + (j0 + j) * p.channels + i0;
        for (int64_t i = 0; i < rows; ++i) row[i] += sums[i * kPanel + j];
    }
}

// The tile number of the lower triangle as its row and column of panels.
struct PanelPair {
    int64_t i, j;
    explicit PanelPair(int64_t number) : i(0), j(0) {
        while ((i + 1) * (i + 2) / 2 <= number) ++i;
        j = number - i * (i + 1) / 2;
    }
};

// Slices are taken several at a time so that the matrix is read and written less often.
int64_t slices_at_once(const GramParams& p) {
    const int64_t all = p.batch * ceil_div(p.height * p.width, kSlice);
    const int64_t fit = std::max<int64_t>(1, int64_t{1 << 20} / (ceil_div(p.channels, kPanel) * kPanel * kSlice));
    return std::min(all, fit);
}

template <typename T>
void run(const GramParams& p) {
    const int64_t positions = p.height * p.width, per_image = ceil_div(positions, kSlice), slices = p.batch * per_image;
    const int64_t panels = ceil_div(p.channels, kPanel), pairs = panels * (panels + 1) / 2;
    const int64_t at_once = slices_at_once(p), panel_size = kPanel * kSlice;
    const Tile multiply = best_tile();
    const auto slice_at = [&](int64_t s) {
        const int64_t first = s % per_image * kSlice;
        return Slice{s / per_image, first, std::min<int64_t>(kSlice, positions - first)};
    };
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
    for (int64_t begin = 0; begin < slices; begin += at_once) {
        const int64_t count = std::min(at_once, slices - begin);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < count * panels; ++task) {
            pack_panel<T>(p, slice_at(begin + task / panels), task % panels, p.workspace + task * panel_size);
        }
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < pairs; ++number) {
            const PanelPair pair(number);
            alignas(64) float sums[kPanel * kPanel] = {};
            for (int64_t s = 0; s < count; ++s) {
                const float* packed = p.workspace + s * panels * panel_size;
                multiply(packed + pair.i * panel_size, packed + pair.j * panel_size, slice_at(begin + s).count, sums);
            }
            add_tile(p, pair.i, pair.j, sums);
        }
    }
}

}  // namespace

int64_t gram_workspace(const GramParams& p) {
    return slices_at_once(p) * ceil_div(p.channels, kPanel) * kPanel * kSlice;
}

Status gram_cpu(const GramParams& p) {
    if (p.threads < 1 || p.channels < 1) return Status::bad_argument;
    return by_dtype(p.dtype, [&](auto element) { run<decltype(element)>(p); });
}

}  // namespace vss
