// What every plugin here shares: fields that are small integers, messages, and the walls that keep exceptions inside.
//
// A plugin is a struct with
//   kName                                      the op type in ONNX
//   kFields, values                            its integer attributes: name, default, range; and what they are
//   kMinInputs, kInputs, kOutputs  numbers of tensors
//   type, accepts, shapes, check, run          output types, input types, output shapes, known sides, the kernel
// and `Host` makes an IPluginV3 of it, for TensorRT 10 and 11 from one source. The library exports getCreators and
// setLoggerFinder, which is all that a registry needs; it is built from headers alone and links to no TensorRT.
//
// Built without CUDA (no VSS_WITH_CUDA), `run` calls the CPU kernels on host memory: that is how the tests run it.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include "common.h"

#if defined(VSS_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace vss::trt {

using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

constexpr const char* kVersion = "1";
constexpr const char* kNamespace = "";  // the ONNX parser looks plugins up without one

// Sends an error to the logger of the engine that called, or to stderr where TensorRT has named none. Never throws.
void say_error(const char* plugin, const char* what) noexcept;

// Runs what may throw; an exception becomes a message and `failure`.
template <typename Result, typename Work>
Result guarded(const char* plugin, Result failure, const Work& work) noexcept {
    try {
        return work();
    } catch (const std::exception& error) {
        say_error(plugin, error.what());
    } catch (...) {
        say_error(plugin, "an exception of unknown type");
    }
    return failure;
}

inline void expect(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

inline void expect_ok(Status status) {
    expect(status == Status::ok,
           status == Status::bad_argument ? "the kernel refused" : "CUDA: " + std::string(status.text));
}

// Sides of the tensors of a plugin. While an engine is built a free side is -1; when it runs all are known.
struct Sides {
    const nvinfer1::Dims* in;
    const nvinfer1::Dims* out;
};

inline bool agree(int64_t side, int64_t other) {
    return side < 0 || other < 0 || side == other;
}

inline bool at_least(int64_t side, int64_t low) {
    return side < 0 || side >= low;
}

inline std::string text(const nvinfer1::Dims& dims) {
    std::string shown = "(";
    for (int32_t i = 0; i < dims.nbDims; ++i) {
        shown += (i > 0 ? ", " : "") + (dims.d[i] < 0 ? std::string("?") : std::to_string(dims.d[i]));
    }
    return shown + ")";
}

inline int64_t count_of(const nvinfer1::Dims& dims) {
    int64_t count = 1;
    for (int32_t i = 0; i < dims.nbDims; ++i) count *= dims.d[i];
    return count;
}

// Element types that the kernels read.
inline bool is_float(DataType type) {
    return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

inline DType kernel_type(DataType type) {
    expect(is_float(type), "inputs are float32, float16 or bfloat16");
    return type == DataType::kFLOAT ? DType::f32 : type == DataType::kHALF ? DType::f16 : DType::bf16;
}

inline void fill_zero(void* data, size_t bytes, cudaStream_t stream) {
#if defined(VSS_WITH_CUDA)
    expect(cudaMemsetAsync(data, 0, bytes, stream) == cudaSuccess, "the CUDA memset failed");
#else
    static_cast<void>(stream);
    std::memset(data, 0, bytes);
#endif
}

struct Field {
    const char* name;
    int32_t value, low, high;  // default and range
};

// The concrete tensors of a call.
struct Tensors {
    const PluginTensorDesc* in;
    const PluginTensorDesc* out;
};

inline int32_t read_field(const Field& field, const nvinfer1::PluginField& given) {
    const bool narrow = given.type == nvinfer1::PluginFieldType::kINT32;
    const bool wide = given.type == nvinfer1::PluginFieldType::kINT64;
    const std::string name = field.name;
    expect((narrow || wide) && given.length == 1 && given.data != nullptr,
           "field '" + name + "' is one int32 or int64, got type " + std::to_string(static_cast<int32_t>(given.type)) +
               " with " + std::to_string(given.length) + " values");
    int64_t value = 0;
    if (wide) {
        std::memcpy(&value, given.data, sizeof value);
    } else {
        int32_t small = 0;
        std::memcpy(&small, given.data, sizeof small);
        value = small;
    }
    expect(value >= field.low && value <= field.high, "field '" + name + "' is " + std::to_string(value) +
                                                          ", expected " + std::to_string(field.low) + " to " +
                                                          std::to_string(field.high));
    return static_cast<int32_t>(value);
}

// The fields of a creation as values; a field that is not given has its default, and every fault is named.
template <size_t N>
std::array<int32_t, N> read_fields(const std::array<Field, N>& fields, const nvinfer1::PluginFieldCollection* given) {
    std::array<int32_t, N> values{};
    std::string known;
    for (size_t i = 0; i < N; ++i) {
        values[i] = fields[i].value;
        known += (i > 0 ? ", " : "") + std::string(fields[i].name);
    }
    expect(given != nullptr && (given->nbFields == 0 || given->fields != nullptr), "no field collection was given");
    for (int32_t g = 0; g < given->nbFields; ++g) {
        const std::string name = given->fields[g].name != nullptr ? given->fields[g].name : "";
        size_t i = 0;
        while (i < N && name != fields[i].name) ++i;
        expect(i < N, "unknown field '" + name + "'; known: " + known);
        values[i] = read_field(fields[i], given->fields[g]);
    }
    return values;
}

template <typename Plugin>
class Host final : public nvinfer1::IPluginV3,
                   public nvinfer1::v_1_0::IPluginV3OneCore,
                   public nvinfer1::v_1_0::IPluginV3OneBuild,
                   public nvinfer1::v_1_0::IPluginV3OneRuntime {
  public:
    explicit Host(const Plugin& plugin) noexcept : plugin_(plugin) {}
    Host(const Host& other) noexcept : plugin_(other.plugin_) {}
    Host& operator=(const Host&) = delete;

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
        switch (type) {
            case nvinfer1::PluginCapabilityType::kCORE:
                return static_cast<nvinfer1::v_1_0::IPluginV3OneCore*>(this);
            case nvinfer1::PluginCapabilityType::kBUILD:
                return static_cast<nvinfer1::v_1_0::IPluginV3OneBuild*>(this);
            case nvinfer1::PluginCapabilityType::kRUNTIME:
                return static_cast<nvinfer1::v_1_0::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    nvinfer1::IPluginV3* clone() noexcept override {
        return guarded<nvinfer1::IPluginV3*>(Plugin::kName, nullptr, [&] { return new Host(*this); });
    }

    const char* getPluginName() const noexcept override { return Plugin::kName; }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }
    int32_t getNbOutputs() const noexcept override { return Plugin::kOutputs; }

    // The smallest and the largest shapes of a profile are as good as constants.
    int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc* out,
                            int32_t outputs) noexcept override {
        return guarded(Plugin::kName, -1, [&] {
            check_counts(inputs, outputs);
            check_sides(in, inputs, out, [](const DynamicPluginTensorDesc& each) { return each.min; });
            check_sides(in, inputs, out, [](const DynamicPluginTensorDesc& each) { return each.max; });
            return 0;
        });
    }

    int32_t getOutputDataTypes(DataType* types, int32_t outputs, const DataType* in,
                               int32_t inputs) const noexcept override {
        return guarded(Plugin::kName, -1, [&] {
            check_counts(inputs, outputs);
            for (int32_t i = 0; i < outputs; ++i) types[i] = Plugin::type(i, in[0]);
            return 0;
        });
    }

    int32_t getOutputShapes(const DimsExprs* in, int32_t inputs, const DimsExprs*, int32_t, DimsExprs* out,
                            int32_t outputs, nvinfer1::IExprBuilder& builder) noexcept override {
        return guarded(Plugin::kName, -1, [&] {
            check_counts(inputs, outputs);
            for (int32_t i = 0; i < inputs; ++i) {
                expect(in[i].nbDims == 4, "input " + std::to_string(i) + " has " + std::to_string(in[i].nbDims) +
                                              " dimensions, expected 4: (N, C, H, W)");
            }
            plugin_.shapes(in, inputs, out, builder);
            check_sides(in, inputs, out, constants);
            return 0;
        });
    }

    bool supportsFormatCombination(int32_t at, const DynamicPluginTensorDesc* tensors, int32_t inputs,
                                   int32_t) noexcept override {
        const PluginTensorDesc& desc = tensors[at].desc;
        const DataType first = tensors[0].desc.type;
        if (desc.format != nvinfer1::TensorFormat::kLINEAR) return false;
        return at < inputs ? Plugin::accepts(at, desc.type, first) : desc.type == Plugin::type(at - inputs, first);
    }

    size_t getWorkspaceSize(const DynamicPluginTensorDesc*, int32_t, const DynamicPluginTensorDesc*,
                            int32_t) const noexcept override {
        return 0;
    }

    int32_t onShapeChange(const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc* out,
                          int32_t outputs) noexcept override {
        return guarded(Plugin::kName, -1, [&] {
            check_counts(inputs, outputs);
            check_sides(in, inputs, out, [](const PluginTensorDesc& each) { return each.dims; });
            return 0;
        });
    }

    int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc* out, const void* const* sources,
                    void* const* targets, void*, cudaStream_t stream) noexcept override {
        return guarded(Plugin::kName, -1, [&] {
            if (count_of(out[0].dims) > 0) plugin_.run({in, out}, sources, targets, stream);
            return 0;
        });
    }

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
        for (size_t i = 0; i < fields_.size(); ++i) {
            fields_[i] = {Plugin::kFields[i].name, &plugin_.values[i], nvinfer1::PluginFieldType::kINT32, 1};
        }
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
        return &collection_;
    }

  private:
    static int32_t check_counts(int32_t inputs, int32_t outputs) {
        expect(inputs >= Plugin::kMinInputs && inputs <= Plugin::kInputs && outputs == Plugin::kOutputs,
               "got " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) + " outputs, expected " +
                   std::to_string(Plugin::kMinInputs) + " to " + std::to_string(Plugin::kInputs) + " and " +
                   std::to_string(Plugin::kOutputs));
        return 0;
    }

    static nvinfer1::Dims constants(const DimsExprs& expressions) {
        nvinfer1::Dims dims{};
        dims.nbDims = expressions.nbDims;
        for (int32_t i = 0; i < dims.nbDims; ++i) {
            dims.d[i] = expressions.d[i]->isConstant() ? expressions.d[i]->getConstantValue() : -1;
        }
        return dims;
    }

    template <typename Tensor, typename DimsOf>
    void check_sides(const Tensor* in, int32_t inputs, const Tensor* out, const DimsOf& dims_of) const {
        std::array<nvinfer1::Dims, Plugin::kInputs> sources{};
        std::array<nvinfer1::Dims, Plugin::kOutputs> targets{};
        for (int32_t i = 0; i < inputs; ++i) sources[static_cast<size_t>(i)] = dims_of(in[i]);
        for (size_t i = 0; i < targets.size(); ++i) targets[i] = dims_of(out[i]);
        plugin_.check({sources.data(), targets.data()});
    }

    Plugin plugin_;
    std::array<nvinfer1::PluginField, Plugin::kFields.size()> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

template <typename Plugin>
class Creator final : public nvinfer1::v_1_0::IPluginCreatorV3One {
  public:
    Creator() noexcept {
        for (size_t i = 0; i < fields_.size(); ++i) {
            fields_[i] = {Plugin::kFields[i].name, nullptr, nvinfer1::PluginFieldType::kINT32, 1};
        }
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    }

    // In the build phase the fields are attributes of an ONNX node, at run time what getFieldsToSerialize gave.
    nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* given,
                                      nvinfer1::TensorRTPhase) noexcept override {
        return guarded<nvinfer1::IPluginV3*>(Plugin::kName, nullptr, [&] {
            Plugin plugin;
            plugin.values = read_fields(Plugin::kFields, given);
            return new Host<Plugin>(plugin);
        });
    }

    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
    const char* getPluginName() const noexcept override { return Plugin::kName; }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }

  private:
    std::array<nvinfer1::PluginField, Plugin::kFields.size()> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

// One creator per plugin; defined beside its plugin, listed in creators.cpp.
nvinfer1::IPluginCreatorInterface* seg_argmax_creator() noexcept;
nvinfer1::IPluginCreatorInterface* max_pool_creator() noexcept;
nvinfer1::IPluginCreatorInterface* max_unpool_creator() noexcept;

}  // namespace vss::trt
