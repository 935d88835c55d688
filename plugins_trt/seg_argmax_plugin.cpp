// VssSegArgmax: logits (N, K, h, w) -> labels int32 (N, H, W), bilinear resize and argmax in one pass. H and W are the
// fields out_h and out_w, or, where those are 0, the last two dimensions of a second input whose values nobody reads.
#include "seg_argmax.h"

#include <vector>

#include "plugin.h"

namespace vss::trt {
namespace {

constexpr int32_t kLongest = 1 << 20;

struct SegArgmax {
    static constexpr const char* kName = "VssSegArgmax";
    static constexpr std::array<Field, 3> kFields{
        {{"out_h", 0, 0, kLongest}, {"out_w", 0, 0, kLongest}, {"align_corners", 0, 0, 1}}};
    static constexpr int32_t kMinInputs = 1, kInputs = 2, kOutputs = 1;
    std::array<int32_t, 3> values{};

    static DataType type(int32_t, DataType) { return DataType::kINT32; }
    static bool accepts(int32_t, DataType type, DataType first) { return is_float(type) && type == first; }

    void shapes(const DimsExprs* in, int32_t inputs, DimsExprs* out, nvinfer1::IExprBuilder& builder) const {
        const bool fixed = values[0] > 0 && values[1] > 0;
        expect(fixed || inputs == 2, "give out_h and out_w, or a second input with the height and width of the labels");
        out[0].nbDims = 3;
        out[0].d[0] = in[0].d[0];
        out[0].d[1] = fixed ? builder.constant(values[0]) : in[1].d[2];
        out[0].d[2] = fixed ? builder.constant(values[1]) : in[1].d[3];
    }

    void check(const Sides& t) const {
        const auto& in = t.in[0];
        const auto& out = t.out[0];
        expect(in.nbDims == 4 && out.nbDims == 3 && agree(in.d[0], out.d[0]),
               "logits " + text(in) + " and labels " + text(out) + " do not belong together");
        expect(at_least(in.d[1], 1) && in.d[1] <= kSegArgmaxMaxClasses,
               "logits " + text(in) + " must have 1 to " + std::to_string(kSegArgmaxMaxClasses) + " classes");
        expect(at_least(in.d[2], 1) && at_least(in.d[3], 1), "logits " + text(in) + " have no pixels");
    }

    void run(const Tensors& t, const void* const* in, void* const* out, cudaStream_t stream) const {
        const auto& dims = t.in[0].dims;
        SegArgmaxParams p{};
        p.logits = in[0];
        p.dtype = kernel_type(t.in[0].type);
        p.batch = dims.d[0], p.classes = dims.d[1], p.in_h = dims.d[2], p.in_w = dims.d[3];
        p.out_h = t.out[0].dims.d[1], p.out_w = t.out[0].dims.d[2];
        p.stride_w = 1, p.stride_h = p.in_w, p.stride_c = p.in_h * p.in_w, p.stride_n = p.classes * p.stride_c;
        p.align_corners = values[2] != 0;
        p.wide_labels = static_cast<int32_t*>(out[0]);
        p.threads = 1;
#if defined(VSS_WITH_CUDA)
        expect_ok(seg_argmax_cuda(p, stream));
#else
        static_cast<void>(stream);
        std::vector<float> workspace(static_cast<size_t>(seg_argmax_workspace(p)));
        p.workspace = workspace.data();
        expect_ok(seg_argmax_cpu(p));
#endif
    }
};

}  // namespace

nvinfer1::IPluginCreatorInterface* seg_argmax_creator() noexcept {
    static Creator<SegArgmax> creator;
    return &creator;
}

}  // namespace vss::trt
