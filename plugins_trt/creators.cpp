// The two functions that TensorRT's registry looks for in a plugin library, and one that tells a loader which major
// version the library was built for: interfaces differ between 10 and 11. A new plugin is one more line here.
#include "plugin.h"

#define VSS_EXPORT extern "C" __attribute__((visibility("default")))

namespace vss::trt {
namespace {

nvinfer1::ILoggerFinder* finder = nullptr;

}  // namespace

void say_error(const char* plugin, const char* what) noexcept {
    char line[512];
    std::snprintf(line, sizeof line, "%s: %s.", plugin, what);
    nvinfer1::ILogger* logger = finder != nullptr ? finder->findLogger() : nullptr;
    if (logger != nullptr) {
        logger->log(nvinfer1::ILogger::Severity::kERROR, line);
    } else {
        std::fprintf(stderr, "%s\n", line);
    }
}

}  // namespace vss::trt

VSS_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* found) {
    vss::trt::finder = found;
}

VSS_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static nvinfer1::IPluginCreatorInterface* const creators[] = {
        vss::trt::seg_argmax_creator(),
        vss::trt::max_pool_creator(),
        vss::trt::max_unpool_creator(),
    };
    count = static_cast<int32_t>(sizeof creators / sizeof creators[0]);
    return creators;
}

VSS_EXPORT int32_t vssTensorRTMajor() {
    return NV_TENSORRT_MAJOR;
}
