// VssMaxPool: x (N, C, H, W) -> maxima (N, C, H/k, W/k) and their places, int32 y * W + x within a map.
// VssMaxUnpool: values and places (N, C, h, w) -> (N, C, 2 h + extra_h, 2 w + extra_w), zero elsewhere; the extra row
// or column is the one that filled no window of an odd map.
#include "max_pool.h"

#include "plugin.h"

namespace vss::trt {
namespace {

using nvinfer1::DimensionOperation;

constexpr int64_t kInt32Max = 2147483647;

MaxPoolParams params(const nvinfer1::Dims& large, const nvinfer1::Dims& small, const nvinfer1::Dims& input) {
    MaxPoolParams p{};
    p.batch = large.d[0], p.channels = large.d[1], p.height = large.d[2], p.width = large.d[3];
    p.pooled_h = small.d[2], p.pooled_w = small.d[3];
    p.stride[3] = 1, p.stride[2] = input.d[3];
    p.stride[1] = input.d[2] * input.d[3], p.stride[0] = input.d[1] * p.stride[1];
    p.threads = 1;
    return p;
}

void check_maps(const nvinfer1::Dims& large, const nvinfer1::Dims& small, int64_t kernel) {
    bool fits = large.nbDims == 4 && small.nbDims == 4;
    for (int32_t axis = 0; fits && axis < 4; ++axis) {
        const bool divided = axis >= 2 && large.d[axis] >= 0;
        fits = agree(divided ? large.d[axis] / kernel : large.d[axis], small.d[axis]);
    }
    expect(fits, "maps " + text(large) + " and " + text(small) + " do not belong together");
    expect(large.d[2] < 0 || large.d[3] < 0 || large.d[2] * large.d[3] <= kInt32Max,
           "maps " + text(large) + " are over the int32 range of their places");
}

struct MaxPool {
    static constexpr const char* kName = "VssMaxPool";
    static constexpr std::array<Field, 1> kFields{{{"kernel", 2, 1, 1024}}};
    static constexpr int32_t kMinInputs = 1, kInputs = 1, kOutputs = 2;
    std::array<int32_t, 1> values{};

    static DataType type(int32_t output, DataType first) { return output == 0 ? first : DataType::kINT32; }
    static bool accepts(int32_t, DataType type, DataType) { return is_float(type); }

    void shapes(const DimsExprs* in, int32_t, DimsExprs* out, nvinfer1::IExprBuilder& builder) const {
        const auto* kernel = builder.constant(values[0]);
        out[0] = in[0];
        for (int32_t axis = 2; axis < 4; ++axis) {
            out[0].d[axis] = builder.operation(DimensionOperation::kFLOOR_DIV, *in[0].d[axis], *kernel);
        }
        out[1] = out[0];
    }

    void check(const Sides& t) const {
        const auto& maps = t.in[0];
        check_maps(maps, t.out[0], values[0]);
        expect(at_least(maps.d[2], values[0]) && at_least(maps.d[3], values[0]),
               "the kernel " + std::to_string(values[0]) + " does not fit into maps " + text(maps));
    }

    void run(const Tensors& t, const void* const* in, void* const* out, cudaStream_t stream) const {
        MaxPoolParams p = params(t.in[0].dims, t.out[0].dims, t.in[0].dims);
        p.dtype = kernel_type(t.in[0].type);
        p.input = in[0], p.output = out[0], p.indices = static_cast<int32_t*>(out[1]);
        p.kernel = values[0];
#if defined(VSS_WITH_CUDA)
        expect_ok(max_pool_cuda(p, stream));
#else
        static_cast<void>(stream);
        expect_ok(max_pool_cpu(p));
#endif
    }
};

struct MaxUnpool {
    static constexpr const char* kName = "VssMaxUnpool";
    static constexpr std::array<Field, 2> kFields{{{"extra_h", 0, 0, 1}, {"extra_w", 0, 0, 1}}};
    static constexpr int32_t kMinInputs = 2, kInputs = 2, kOutputs = 1;
    std::array<int32_t, 2> values{};

    static DataType type(int32_t, DataType first) { return first; }
    static bool accepts(int32_t at, DataType type, DataType) {
        return at == 0 ? is_float(type) : type == DataType::kINT32;
    }

    void shapes(const DimsExprs* in, int32_t, DimsExprs* out, nvinfer1::IExprBuilder& builder) const {
        const auto* two = builder.constant(2);
        out[0] = in[0];
        for (int32_t axis = 2; axis < 4; ++axis) {
            const auto* even = builder.operation(DimensionOperation::kPROD, *in[0].d[axis], *two);
            const auto* extra = builder.constant(values[static_cast<size_t>(axis) - 2]);
            out[0].d[axis] = builder.operation(DimensionOperation::kSUM, *even, *extra);
        }
    }

    void check(const Sides& t) const {
        const auto &values_of = t.in[0], &places = t.in[1];
        bool same = values_of.nbDims == places.nbDims;
        for (int32_t axis = 0; same && axis < places.nbDims; ++axis) same = agree(values_of.d[axis], places.d[axis]);
        expect(same, "values " + text(values_of) + " and places " + text(places) + " do not belong together");
        check_maps(t.out[0], values_of, 2);
    }

    void run(const Tensors& t, const void* const* in, void* const* out, cudaStream_t stream) const {
        MaxPoolParams p = params(t.out[0].dims, t.in[0].dims, t.in[0].dims);
        p.dtype = kernel_type(t.in[0].type);
        p.input = in[0], p.output = out[0];
        p.indices = static_cast<int32_t*>(const_cast<void*>(in[1]));  // unpooling reads them
        fill_zero(out[0], static_cast<size_t>(count_of(t.out[0].dims)) * (p.dtype == DType::f32 ? 4 : 2), stream);
#if defined(VSS_WITH_CUDA)
        expect_ok(max_unpool_cuda(p, stream));
#else
        expect_ok(max_unpool_cpu(p));
#endif
    }
};

}  // namespace

nvinfer1::IPluginCreatorInterface* max_pool_creator() noexcept {
    static Creator<MaxPool> creator;
    return &creator;
}

nvinfer1::IPluginCreatorInterface* max_unpool_creator() noexcept {
    static Creator<MaxUnpool> creator;
    return &creator;
}

}  // namespace vss::trt
