// The least program that runs an ONNX engine through the C API of ONNX Runtime.
//
//   ort_example engine/model.onnx frame.rgb HEIGHT WIDTH [as-written]
//
// frame.rgb: HEIGHT * WIDTH * 3 bytes, RGB. For engines that take uint8 (N, H, W, 3) and give int32 or uint8 labels.
// as-written: for engines whose manifest says so; the graph is not optimised.
// Prints how many pixels every label has.
#include <onnxruntime_c_api.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <vector>

namespace {

const OrtApi* api = nullptr;

void check(OrtStatus* status) {
  if (status == nullptr) return;
  std::fprintf(stderr, "error: %s\n", api->GetErrorMessage(status));
  api->ReleaseStatus(status);
  std::exit(2);
}

std::vector<uint8_t> read_frame(const char* path, size_t bytes) {
  std::vector<uint8_t> pixels(bytes);
  std::FILE* file = std::fopen(path, "rb");
  if (file == nullptr || std::fread(pixels.data(), 1, bytes, file) != bytes) {
    std::fprintf(stderr, "error: %s does not hold %zu bytes\n", path, bytes);
    std::exit(2);
  }
  std::fclose(file);
  return pixels;
}

template <class Label>
void print_counts(const void* labels, size_t count) {
  std::map<int64_t, size_t> counts;
  for (size_t i = 0; i < count; ++i) ++counts[static_cast<int64_t>(static_cast<const Label*>(labels)[i])];
  for (const auto& [label, amount] : counts) std::printf("%lld %zu\n", static_cast<long long>(label), amount);
}

void print_labels(OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api->GetTensorTypeAndShape(value, &info));
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  size_t count = 0;
  check(api->GetTensorElementType(info, &type));
  check(api->GetTensorShapeElementCount(info, &count));
  api->ReleaseTensorTypeAndShapeInfo(info);
  void* labels = nullptr;
  check(api->GetTensorMutableData(value, &labels));
  if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8) return print_counts<uint8_t>(labels, count);
  if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32) return print_counts<int32_t>(labels, count);
  std::fprintf(stderr, "error: the engine gives no labels of uint8 or int32\n");
  std::exit(2);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5 && argc != 6) {
    std::fprintf(stderr, "usage: %s MODEL.onnx FRAME.rgb HEIGHT WIDTH [as-written]\n", argv[0]);
    return 2;
  }
  api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    std::fprintf(stderr, "error: this ONNX Runtime (%s) is older than the header\n", OrtGetApiBase()->GetVersionString());
    return 2;
  }
  const int64_t shape[] = {1, std::atoll(argv[3]), std::atoll(argv[4]), 3};
  std::vector<uint8_t> pixels = read_frame(argv[2], static_cast<size_t>(shape[1] * shape[2] * 3));

  OrtEnv* env = nullptr;
  OrtSessionOptions* options = nullptr;
  OrtSession* session = nullptr;
  OrtMemoryInfo* memory = nullptr;
  OrtValue* image = nullptr;
  OrtValue* labels = nullptr;
  check(api->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "vss", &env));
  check(api->CreateSessionOptions(&options));
  if (argc == 6) check(api->SetSessionGraphOptimizationLevel(options, ORT_DISABLE_ALL));
  check(api->CreateSession(env, argv[1], options, &session));
  check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  check(api->CreateTensorWithDataAsOrtValue(memory, pixels.data(), pixels.size(), shape, 4,
                                            ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, &image));
  const char* inputs[] = {"image"};
  const char* outputs[] = {"labels"};
  check(api->Run(session, nullptr, inputs, &image, 1, outputs, 1, &labels));
  print_labels(labels);

  api->ReleaseValue(labels);
  api->ReleaseValue(image);
  api->ReleaseMemoryInfo(memory);
  api->ReleaseSession(session);
  api->ReleaseSessionOptions(options);
  api->ReleaseEnv(env);
  return 0;
}
