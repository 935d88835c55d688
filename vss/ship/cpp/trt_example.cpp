// The least program that runs a TensorRT engine.
//
//   trt_example engine/model.plan frame.rgb HEIGHT WIDTH [PLUGIN.so]
//
// frame.rgb: HEIGHT * WIDTH * 3 bytes, RGB. For engines that take uint8 (N, H, W, 3) and give int32 labels.
// Prints how many pixels every label has.
#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <vector>

namespace {

class Logger : public nvinfer1::ILogger {
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kWARNING) std::fprintf(stderr, "%s\n", message);
  }
};

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "error: %s\n", what);
  std::exit(2);
}

void check(cudaError_t status) {
  if (status != cudaSuccess) fail(cudaGetErrorString(status));
}

std::vector<char> read_file(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail("a file cannot be opened");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) fail("usage: trt_example MODEL.plan FRAME.rgb HEIGHT WIDTH [PLUGIN.so]");
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) fail("no CUDA device");
  const int64_t height = std::atoll(argv[3]), width = std::atoll(argv[4]);
  const std::vector<char> plan = read_file(argv[1]), frame = read_file(argv[2]);
  const size_t pixels = static_cast<size_t>(height * width);
  if (frame.size() != pixels * 3) fail("the frame does not have HEIGHT * WIDTH * 3 bytes");

  Logger logger;
  std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
  if (!runtime) fail("TensorRT does not start");
  if (argc > 5 && runtime->getPluginRegistry().loadLibrary(argv[5]) == nullptr) fail("the plugin cannot be loaded");
  std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime->deserializeCudaEngine(plan.data(), plan.size()));
  if (!engine) fail("the engine cannot be loaded: it belongs to another GPU or TensorRT version");
  std::unique_ptr<nvinfer1::IExecutionContext> context(engine->createExecutionContext());
  if (!context || !context->setInputShape("image", nvinfer1::Dims4{1, height, width, 3})) fail("wrong size of image");

  void* image = nullptr;
  void* labels = nullptr;
  cudaStream_t stream = nullptr;
  check(cudaMalloc(&image, frame.size()));
  check(cudaMalloc(&labels, pixels * sizeof(int32_t)));
  check(cudaStreamCreate(&stream));
  check(cudaMemcpyAsync(image, frame.data(), frame.size(), cudaMemcpyHostToDevice, stream));
  if (!context->setTensorAddress("image", image) || !context->setTensorAddress("labels", labels)) fail("no such binding");
  if (!context->enqueueV3(stream)) fail("the engine does not run");
  std::vector<int32_t> found(pixels);
  check(cudaMemcpyAsync(found.data(), labels, pixels * sizeof(int32_t), cudaMemcpyDeviceToHost, stream));
  check(cudaStreamSynchronize(stream));

  std::map<int32_t, size_t> counts;
  for (int32_t label : found) ++counts[label];
  for (const auto& [label, amount] : counts) std::printf("%d %zu\n", label, amount);
  check(cudaFree(labels));
  check(cudaFree(image));
  check(cudaStreamDestroy(stream));
  return 0;
}
