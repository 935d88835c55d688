// What TensorRT brings to a plugin: a logger, and dimensions as expressions. An expression is its value here, -1 where
// the side is free.
#pragma once

#include <NvInferRuntime.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "check.h"

namespace vss::test {

using namespace nvinfer1;

inline std::string last_message;

struct Logger final : ILogger {
    void log(Severity severity, const char* message) noexcept override {
        check(severity == Severity::kERROR, "messages are errors");
        last_message = message;
    }
};

inline Logger logger;

struct Finder final : ILoggerFinder {
    ILogger* findLogger() noexcept override { return &logger; }
};

inline Finder finder;

struct Number final : IDimensionExpr, apiv::VDimensionExpr {
    explicit Number(int64_t v) : value(v) { mImpl = this; }
    ~Number() noexcept override = default;
    bool isConstant() const override { return value >= 0; }
    int64_t getConstantValue() const override { return isConstant() ? value : std::numeric_limits<int64_t>::min(); }
    bool isSizeTensor() const override { return false; }
    int64_t value;
};

struct Builder final : IExprBuilder, apiv::VExprBuilder {
    Builder() { mImpl = this; }
    ~Builder() noexcept override = default;

    const IDimensionExpr* constant(int64_t value) override {
        kept.push_back(std::make_unique<Number>(value));
        return kept.back().get();
    }
    const IDimensionExpr* operation(DimensionOperation op, const IDimensionExpr& a, const IDimensionExpr& b) override {
        const int64_t x = a.getConstantValue(), y = b.getConstantValue();
        if (!a.isConstant() || !b.isConstant()) return constant(-1);
        switch (op) {
            case DimensionOperation::kSUM:
                return constant(x + y);
            case DimensionOperation::kPROD:
                return constant(x * y);
            case DimensionOperation::kFLOOR_DIV:
                return constant(x / y);
            default:
                return constant(-1);
        }
    }
    const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
        return nullptr;
    }
    std::vector<std::unique_ptr<Number>> kept;
};

using Sides = std::vector<int64_t>;

inline auto* build_of(IPluginV3& plugin) {
    return static_cast<v_1_0::IPluginV3OneBuild*>(plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
}
inline auto* runtime_of(IPluginV3& plugin) {
    return static_cast<v_1_0::IPluginV3OneRuntime*>(plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}
inline auto* core_of(IPluginV3& plugin) {
    return static_cast<v_1_0::IPluginV3OneCore*>(plugin.getCapabilityInterface(PluginCapabilityType::kCORE));
}

// Output shapes that a plugin gives for input shapes; empty when it refuses.
inline std::vector<Sides> shapes_of(IPluginV3& plugin, const std::vector<Sides>& inputs) {
    Builder builder;
    std::vector<DimsExprs> in(inputs.size()), out(static_cast<size_t>(build_of(plugin)->getNbOutputs()));
    for (size_t i = 0; i < inputs.size(); ++i) {
        in[i].nbDims = static_cast<int32_t>(inputs[i].size());
        for (size_t d = 0; d < inputs[i].size(); ++d) in[i].d[d] = builder.constant(inputs[i][d]);
    }
    const auto inputs_count = static_cast<int32_t>(in.size()), outputs_count = static_cast<int32_t>(out.size());
    if (build_of(plugin)->getOutputShapes(in.data(), inputs_count, nullptr, 0, out.data(), outputs_count, builder)) {
        return {};
    }
    std::vector<Sides> found;
    for (const auto& each : out) {
        Sides sides;
        for (int32_t d = 0; d < each.nbDims; ++d) {
            sides.push_back(each.d[d]->isConstant() ? each.d[d]->getConstantValue() : -1);
        }
        found.push_back(sides);
    }
    return found;
}

inline PluginTensorDesc desc(const Sides& sides, DataType type) {
    PluginTensorDesc made{};
    made.dims.nbDims = static_cast<int32_t>(sides.size());
    std::copy(sides.begin(), sides.end(), made.dims.d);
    made.type = type, made.format = TensorFormat::kLINEAR;
    return made;
}

}  // namespace vss::test
