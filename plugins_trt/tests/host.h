// What TensorRT brings to a plugin: a logger, and dimensions as expressions. An expression is its value here.
#pragma once

#include <NvInferRuntime.h>

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
    bool isConstant() const override { return true; }
    int64_t getConstantValue() const override { return value; }
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

}  // namespace vss::test
