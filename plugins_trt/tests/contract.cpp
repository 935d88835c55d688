// Drives a plugin library as TensorRT would, without TensorRT: creators, fields, types, shapes, serialisation,
// refusals, and the kernels on host memory (the library is one that was built without CUDA).  contract LIBRARY
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "host.h"

namespace {

using namespace nvinfer1;
using namespace vss::test;

using Creators = std::vector<IPluginCreatorV3One*>;
using Fields = std::vector<PluginField>;

Creators creators;

IPluginCreatorV3One* creator_of(const std::string& name) {
    for (auto* each : creators) {
        if (name == each->getPluginName()) return each;
    }
    std::fprintf(stderr, "no creator %s\n", name.c_str());
    std::exit(1);
}

std::unique_ptr<IPluginV3> make(const std::string& name, const Fields& fields, TensorRTPhase phase) {
    const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
    return std::unique_ptr<IPluginV3>(creator_of(name)->createPlugin("node", &collection, phase));
}

PluginField field(const char* name, const int32_t& value) {
    return {name, &value, PluginFieldType::kINT32, 1};
}

bool accepts(IPluginV3& plugin, int32_t at, const std::vector<DataType>& types, int32_t inputs,
             TensorFormat format = TensorFormat::kLINEAR) {
    std::vector<DynamicPluginTensorDesc> tensors(types.size());
    for (size_t i = 0; i < types.size(); ++i) {
        tensors[i].desc = desc({1, 2, 3, 4}, types[i]);
        tensors[i].desc.format = format;
    }
    const auto outputs = static_cast<int32_t>(types.size()) - inputs;
    return build_of(plugin)->supportsFormatCombination(at, tensors.data(), inputs, outputs);
}

uint16_t half_of(float value) {  // exact for the small integers that the tests use
    if (value == 0.0f) return 0;
    int exponent;
    const float fraction = std::frexp(std::fabs(value), &exponent);
    const auto mantissa = static_cast<uint16_t>(std::lround((2 * fraction - 1) * 1024));
    return static_cast<uint16_t>((value < 0 ? 0x8000 : 0) | ((exponent + 14) << 10) | mantissa);
}

void check_catalogue() {
    const char* expected[][4] = {{"VssSegArgmax", "out_h", "out_w", "align_corners"},
                                 {"VssMaxPool", "kernel", nullptr, nullptr},
                                 {"VssMaxUnpool", "extra_h", "extra_w", nullptr}};
    check(creators.size() == 3, "three creators", static_cast<long long>(creators.size()));
    for (const auto& row : expected) {
        auto* creator = creator_of(row[0]);
        check(std::string(creator->getPluginVersion()) == "1", "version");
        check(std::string(creator->getPluginNamespace()).empty(), "namespace");
        const auto* names = creator->getFieldNames();
        for (int32_t i = 0; i < 3; ++i) {
            if (row[i + 1] == nullptr) {
                check(names->nbFields <= i, "no further field");
            } else {
                check(i < names->nbFields && std::string(names->fields[i].name) == row[i + 1], row[i + 1]);
            }
        }
        auto plugin = make(row[0], {}, TensorRTPhase::kBUILD);
        check(plugin != nullptr, "made with defaults");
        check(std::string(core_of(*plugin)->getPluginName()) == row[0], "name of the plugin");
    }
}

void refuse(const std::string& name, const Fields& fields, const char* words) {
    last_message.clear();
    check(make(name, fields, TensorRTPhase::kBUILD) == nullptr, words);
    const bool said = last_message.find(words) != std::string::npos && last_message.find(name) == 0;
    if (!said) std::fprintf(stderr, "said: %s\n", last_message.c_str());
    check(said, words);
}

void check_bad_fields() {
    const int32_t two = 2, negative = -1, large = 2000;
    const int64_t wide = int64_t{1} << 40;
    const float real = 2.0f;
    refuse("VssMaxPool", {field("colour", two)}, "unknown field 'colour'; known: kernel");
    refuse("VssMaxPool", {{nullptr, &two, PluginFieldType::kINT32, 1}}, "unknown field ''");
    refuse("VssMaxPool", {{"kernel", &real, PluginFieldType::kFLOAT32, 1}}, "one int32 or int64, got type 1 with 1");
    refuse("VssMaxPool", {{"kernel", &two, PluginFieldType::kINT32, 2}}, "got type 5 with 2 values");
    refuse("VssMaxPool", {{"kernel", nullptr, PluginFieldType::kINT32, 1}}, "field 'kernel' is one int32");
    refuse("VssMaxPool", {field("kernel", negative)}, "field 'kernel' is -1, expected 1 to 1024");
    refuse("VssMaxPool", {field("kernel", large)}, "field 'kernel' is 2000");
    refuse("VssMaxUnpool", {field("extra_w", two)}, "field 'extra_w' is 2, expected 0 to 1");
    refuse("VssSegArgmax", {{"out_h", &wide, PluginFieldType::kINT64, 1}}, "field 'out_h' is 1099511627776");
    last_message.clear();
    check(creator_of("VssMaxPool")->createPlugin("node", nullptr, TensorRTPhase::kBUILD) == nullptr, "no fields");
    check(last_message.find("no field collection") != std::string::npos, "no field collection");
    const int64_t four = 4;
    auto plugin = make("VssMaxPool", {{"kernel", &four, PluginFieldType::kINT64, 1}}, TensorRTPhase::kBUILD);
    check(plugin && shapes_of(*plugin, {{1, 2, 9, 8}})[0] == Sides({1, 2, 2, 2}), "an int64 field");
}

void check_shapes() {
    const int32_t height = 33, width = 65, one = 1;
    auto fixed = make("VssSegArgmax", {field("out_h", height), field("out_w", width)}, TensorRTPhase::kBUILD);
    check(shapes_of(*fixed, {{2, 19, 8, 16}}) == std::vector<Sides>{{2, 33, 65}}, "fixed size");
    auto like = make("VssSegArgmax", {}, TensorRTPhase::kBUILD);
    check(shapes_of(*like, {{2, 19, 8, 16}, {2, 3, 132, 260}}) == std::vector<Sides>{{2, 132, 260}},
          "size of an input");
    check(shapes_of(*like, {{2, 19, 8, 16}}).empty(), "no size");
    check(last_message.find("VssSegArgmax: give out_h and out_w, or a second input") == 0, "no size said");
    check(shapes_of(*like, {{2, 19, 8}, {2, 3, 132, 260}}).empty(), "rank");
    check(last_message.find("input 0 has 3 dimensions, expected 4") != std::string::npos, "rank said");
    auto pool = make("VssMaxPool", {}, TensorRTPhase::kBUILD);
    check(shapes_of(*pool, {{2, 5, 9, 14}}) == std::vector<Sides>{{2, 5, 4, 7}, {2, 5, 4, 7}}, "pooled");
    check(shapes_of(*pool, {{2, 5, 9, 14}, {1, 1, 1, 1}}).empty(), "counts");
    check(last_message.find("got 2 inputs and 2 outputs, expected 1 to 1 and 2") != std::string::npos, "counts said");
    auto unpool = make("VssMaxUnpool", {field("extra_h", one)}, TensorRTPhase::kBUILD);
    check(shapes_of(*unpool, {{2, 5, 4, 7}, {2, 5, 4, 7}}) == std::vector<Sides>{{2, 5, 9, 14}}, "unpooled");
}

void refuse_shapes(IPluginV3& plugin, const std::vector<Sides>& inputs, const char* words) {
    last_message.clear();
    check(shapes_of(plugin, inputs).empty(), words);
    check(last_message == words, last_message.c_str());
}

// Sides that are known while an engine is built: constants of the file, and the ends of a profile. -1 is a free side.
void check_known_sides() {
    const int32_t large = 99, eight = 8;
    auto pool = make("VssMaxPool", {field("kernel", large)}, TensorRTPhase::kBUILD);
    refuse_shapes(*pool, {{1, 4, 8, 8}}, "VssMaxPool: the kernel 99 does not fit into maps (1, 4, 8, 8).");
    refuse_shapes(*pool, {{-1, 4, 99, 98}}, "VssMaxPool: the kernel 99 does not fit into maps (?, 4, 99, 98).");
    refuse_shapes(*pool, {{1, 4, 1 << 16, 1 << 16}},
                  "VssMaxPool: maps (1, 4, 65536, 65536) are over the int32 range of their places.");
    check(shapes_of(*pool, {{1, 4, 99, 99}}) == std::vector<Sides>{{1, 4, 1, 1}, {1, 4, 1, 1}}, "one window");
    check(shapes_of(*pool, {{-1, 4, -1, 198}}) == std::vector<Sides>{{-1, 4, -1, 2}, {-1, 4, -1, 2}}, "free sides");
    auto unpool = make("VssMaxUnpool", {}, TensorRTPhase::kBUILD);
    refuse_shapes(*unpool, {{1, 4, 8, 8}, {1, 4, 4, 4}},
                  "VssMaxUnpool: values (1, 4, 8, 8) and places (1, 4, 4, 4) do not belong together.");
    refuse_shapes(*unpool, {{-1, 4, 8, -1}, {2, 3, -1, 8}},
                  "VssMaxUnpool: values (?, 4, 8, ?) and places (2, 3, ?, 8) do not belong together.");
    check(shapes_of(*unpool, {{2, 4, -1, 8}, {-1, 4, 8, 8}}) == std::vector<Sides>{{2, 4, -1, 16}}, "free values");
    auto labels = make("VssSegArgmax", {field("out_h", eight), field("out_w", eight)}, TensorRTPhase::kBUILD);
    refuse_shapes(*labels, {{-1, 300, 4, 4}}, "VssSegArgmax: logits (?, 300, 4, 4) must have 1 to 256 classes.");
    refuse_shapes(*labels, {{1, 3, 0, -1}}, "VssSegArgmax: logits (1, 3, 0, ?) have no pixels.");
    check(shapes_of(*labels, {{-1, -1, -1, -1}}) == std::vector<Sides>{{-1, 8, 8}}, "free logits");

    const auto ends = [](const Sides& low, const Sides& high, DataType type) {
        DynamicPluginTensorDesc made{desc(high, type), desc(low, type).dims, desc(high, type).dims,
                                     desc(high, type).dims};
        made.desc.dims.d[2] = made.desc.dims.d[3] = -1;
        return made;
    };
    const auto f32 = DataType::kFLOAT, i32 = DataType::kINT32;
    const auto halved = [&](int64_t low, int64_t high) {
        const DynamicPluginTensorDesc in = ends({1, 4, low, low}, {2, 4, high, high}, f32);
        const auto small = [&](DataType type) {
            return ends({1, 4, low / 99, low / 99}, {2, 4, high / 99, high / 99}, type);
        };
        const DynamicPluginTensorDesc outs[] = {small(f32), small(i32)};
        return build_of(*pool)->configurePlugin(&in, 1, outs, 2);
    };
    check(halved(99, 300) == 0, "a profile whose smallest maps hold one window");
    last_message.clear();
    check(halved(64, 300) == -1, "a profile whose smallest maps hold none");
    check(last_message == "VssMaxPool: the kernel 99 does not fit into maps (1, 4, 64, 64).", last_message.c_str());
    check(halved(99, 1 << 16) == -1, "a profile whose largest maps are too large");
    check(last_message.find("(2, 4, 65536, 65536) are over the int32 range") != std::string::npos, "the largest said");
}

void check_types() {
    const auto f32 = DataType::kFLOAT, f16 = DataType::kHALF, i32 = DataType::kINT32, u8 = DataType::kUINT8;
    auto labels = make("VssSegArgmax", {}, TensorRTPhase::kBUILD);
    for (const auto type : {f32, f16, DataType::kBF16}) {
        DataType out{};
        check(build_of(*labels)->getOutputDataTypes(&out, 1, &type, 1) == 0 && out == i32, "labels are int32");
        check(accepts(*labels, 0, {type, i32}, 1) && accepts(*labels, 1, {type, i32}, 1), "float in, int32 out");
        check(!accepts(*labels, 1, {type, u8}, 1), "no uint8 out");
        check(!accepts(*labels, 0, {type, i32}, 1, TensorFormat::kCHW32), "linear alone");
    }
    check(!accepts(*labels, 0, {DataType::kINT8, i32}, 1), "no int8 in");
    check(!accepts(*labels, 1, {f32, f16, i32}, 2), "one type for both inputs");
    auto pool = make("VssMaxPool", {}, TensorRTPhase::kBUILD);
    DataType outs[2]{};
    check(build_of(*pool)->getOutputDataTypes(outs, 2, &f16, 1) == 0 && outs[0] == f16 && outs[1] == i32, "pool types");
    check(accepts(*pool, 1, {f16, f16, i32}, 1) && !accepts(*pool, 1, {f16, f32, i32}, 1), "pool keeps its type");
    auto unpool = make("VssMaxUnpool", {}, TensorRTPhase::kBUILD);
    check(accepts(*unpool, 1, {f16, i32, f16}, 2) && !accepts(*unpool, 1, {f16, DataType::kINT64, f16}, 2), "places");
    DynamicPluginTensorDesc none{};
    check(build_of(*unpool)->getWorkspaceSize(&none, 2, &none, 1) == 0, "workspace of unpooling");
}

void check_serialisation() {
    const int32_t height = 12, width = 34, corners = 1;
    auto built = make("VssSegArgmax", {field("align_corners", corners), field("out_w", width), field("out_h", height)},
                      TensorRTPhase::kBUILD);
    std::unique_ptr<IPluginV3> copy(built->clone());
    std::unique_ptr<IPluginV3> attached(runtime_of(*copy)->attachToContext(nullptr));
    built.reset();
    const auto* kept = runtime_of(*attached)->getFieldsToSerialize();
    const std::pair<const char*, int32_t> expected[] = {{"out_h", 12}, {"out_w", 34}, {"align_corners", 1}};
    check(kept->nbFields == 3, "three fields");
    for (int32_t i = 0; i < 3; ++i) {
        const auto& found = kept->fields[i];
        check(std::string(found.name) == expected[i].first && found.type == PluginFieldType::kINT32 &&
                  found.length == 1 && *static_cast<const int32_t*>(found.data) == expected[i].second,
              expected[i].first);
    }
    auto again = make("VssSegArgmax", Fields(kept->fields, kept->fields + kept->nbFields), TensorRTPhase::kRUNTIME);
    check(shapes_of(*again, {{1, 2, 3, 4}}) == std::vector<Sides>{{1, 12, 34}}, "made again from its fields");
}

// Logits are small integers, exact in float16 as well; the reference is a plain double computation.
void check_labels(bool half, bool corners, int64_t height, int64_t width) {
    const int64_t n = 2, k = 5, h = 4, w = 6;
    const int32_t align = corners ? 1 : 0, rows = static_cast<int32_t>(height), columns = static_cast<int32_t>(width);
    auto plugin = make("VssSegArgmax", {field("out_h", rows), field("out_w", columns), field("align_corners", align)},
                       TensorRTPhase::kRUNTIME);
    std::vector<float> logits = vss::test::normal(static_cast<size_t>(n * k * h * w), 7);
    for (float& value : logits) value = std::round(4 * value);
    std::vector<uint16_t> narrow(logits.size());
    std::transform(logits.begin(), logits.end(), narrow.begin(), half_of);
    std::vector<int32_t> labels(static_cast<size_t>(n * height * width), -1);
    const PluginTensorDesc in = desc({n, k, h, w}, half ? DataType::kHALF : DataType::kFLOAT);
    const PluginTensorDesc out = desc({n, height, width}, DataType::kINT32);
    const void* source = half ? static_cast<const void*>(narrow.data()) : logits.data();
    void* target = labels.data();
    check(runtime_of(*plugin)->onShapeChange(&in, 1, &out, 1) == 0, "shape change");
    check(runtime_of(*plugin)->enqueue(&in, &out, &source, &target, nullptr, nullptr) == 0, "enqueue");
    const auto place = [&](int64_t at, int64_t from, int64_t to) {
        if (corners) return to > 1 ? static_cast<double>(at) * (from - 1) / (to - 1) : 0.0;
        return std::max(0.0, (at + 0.5) * from / to - 0.5);
    };
    for (int64_t b = 0; b < n; ++b) {
        for (int64_t y = 0; y < height; ++y) {
            for (int64_t x = 0; x < width; ++x) {
                const double sy = place(y, h, height), sx = place(x, w, width);
                const auto y0 = std::min<int64_t>(static_cast<int64_t>(sy), h - 1), y1 = std::min(y0 + 1, h - 1);
                const auto x0 = std::min<int64_t>(static_cast<int64_t>(sx), w - 1), x1 = std::min(x0 + 1, w - 1);
                std::vector<double> scores;
                for (int64_t c = 0; c < k; ++c) {
                    const float* map = logits.data() + (b * k + c) * h * w;
                    const double top = (1 - (sx - x0)) * map[y0 * w + x0] + (sx - x0) * map[y0 * w + x1];
                    const double bottom = (1 - (sx - x0)) * map[y1 * w + x0] + (sx - x0) * map[y1 * w + x1];
                    scores.push_back((1 - (sy - y0)) * top + (sy - y0) * bottom);
                }
                const int32_t label = labels[static_cast<size_t>((b * height + y) * width + x)];
                const double best = *std::max_element(scores.begin(), scores.end());
                check(label >= 0 && label < k && scores[static_cast<size_t>(label)] >= best - 1e-5, "label", y, x);
            }
        }
    }
}

void check_pooling(bool half, int64_t height, int64_t width) {
    const int64_t n = 2, c = 3, h = height / 2, w = width / 2;
    const int32_t extra_h = static_cast<int32_t>(height % 2), extra_w = static_cast<int32_t>(width % 2);
    std::vector<float> x = vss::test::normal(static_cast<size_t>(n * c * height * width), 11);
    for (float& value : x) value = std::round(3 * value);  // ties too
    const size_t item = half ? 2 : 4, small = static_cast<size_t>(n * c * h * w);
    const auto pack = [&](const std::vector<float>& values) {
        std::vector<uint8_t> bytes(values.size() * item);
        for (size_t i = 0; i < values.size(); ++i) {
            const uint16_t narrow = half_of(values[i]);
            std::memcpy(bytes.data() + i * item, half ? static_cast<const void*>(&narrow) : &values[i], item);
        }
        return bytes;
    };
    const auto type = half ? DataType::kHALF : DataType::kFLOAT;
    const std::vector<uint8_t> input = pack(x);
    std::vector<uint8_t> maxima(small * item), back(x.size() * item, 0xff);
    std::vector<int32_t> places(small, -1);
    auto pool = make("VssMaxPool", {}, TensorRTPhase::kRUNTIME);
    const PluginTensorDesc large_desc = desc({n, c, height, width}, type), small_desc = desc({n, c, h, w}, type);
    const PluginTensorDesc places_desc = desc({n, c, h, w}, DataType::kINT32);
    const PluginTensorDesc outs[] = {small_desc, places_desc}, ins[] = {small_desc, places_desc};
    const void* source = input.data();
    void* targets[] = {maxima.data(), places.data()};
    check(runtime_of(*pool)->onShapeChange(&large_desc, 1, outs, 2) == 0, "pool shape change");
    check(runtime_of(*pool)->enqueue(&large_desc, outs, &source, targets, nullptr, nullptr) == 0, "pool enqueue");
    std::vector<float> best(small, -std::numeric_limits<float>::infinity()), spread(x.size(), 0.0f);
    std::vector<int32_t> where(small, -1);
    for (int64_t m = 0; m < n * c; ++m) {
        for (int64_t y = 0; y < 2 * h; ++y) {
            for (int64_t column = 0; column < 2 * w; ++column) {
                const auto at = static_cast<size_t>((m * h + y / 2) * w + column / 2);
                const float value = x[static_cast<size_t>((m * height + y) * width + column)];
                if (value > best[at]) best[at] = value, where[at] = static_cast<int32_t>(y * width + column);
            }
        }
    }
    for (size_t i = 0; i < small; ++i) {
        const size_t map = i / static_cast<size_t>(h * w);
        spread[map * static_cast<size_t>(height * width) + static_cast<size_t>(where[i])] = best[i];
    }
    check(maxima == pack(best), "maxima");
    check(places == where, "places");
    auto unpool = make("VssMaxUnpool", {field("extra_h", extra_h), field("extra_w", extra_w)}, TensorRTPhase::kRUNTIME);
    const void* sources[] = {maxima.data(), places.data()};
    void* target = back.data();
    check(runtime_of(*unpool)->onShapeChange(ins, 2, &large_desc, 1) == 0, "unpool shape change");
    check(runtime_of(*unpool)->enqueue(ins, &large_desc, sources, &target, nullptr, nullptr) == 0, "unpool enqueue");
    check(back == pack(spread), "unpooled maps");
    places[0] = static_cast<int32_t>(height * width);
    check(runtime_of(*unpool)->enqueue(ins, &large_desc, sources, &target, nullptr, nullptr) == 0, "a bad place");
}

void check_bad_shapes() {
    auto labels = make("VssSegArgmax", {}, TensorRTPhase::kRUNTIME);
    const PluginTensorDesc many = desc({1, 300, 4, 4}, DataType::kFLOAT), out = desc({1, 8, 8}, DataType::kINT32);
    check(runtime_of(*labels)->onShapeChange(&many, 1, &out, 1) == -1, "300 classes");
    check(last_message == "VssSegArgmax: logits (1, 300, 4, 4) must have 1 to 256 classes.", last_message.c_str());
    const PluginTensorDesc whole = desc({1, 3, 4, 4}, DataType::kINT8);
    const void* source = nullptr;
    void* target = nullptr;
    check(runtime_of(*labels)->enqueue(&whole, &out, &source, &target, nullptr, nullptr) == -1, "an int8 input");
    check(last_message.find("inputs are float32, float16 or bfloat16") != std::string::npos, "an int8 input said");
    auto unpool = make("VssMaxUnpool", {}, TensorRTPhase::kRUNTIME);
    const PluginTensorDesc ins[] = {desc({1, 2, 3, 4}, DataType::kFLOAT), desc({1, 2, 3, 4}, DataType::kINT32)};
    const PluginTensorDesc odd = desc({1, 2, 9, 9}, DataType::kFLOAT);
    check(runtime_of(*unpool)->onShapeChange(ins, 2, &odd, 1) == -1, "maps of two sizes");
    check(last_message.find("maps (1, 2, 9, 9) and (1, 2, 3, 4) do not belong together") != std::string::npos, "sizes");
    auto pool = make("VssMaxPool", {}, TensorRTPhase::kRUNTIME);
    const PluginTensorDesc empty = desc({0, 2, 8, 8}, DataType::kFLOAT);
    const PluginTensorDesc outs[] = {desc({0, 2, 4, 4}, DataType::kFLOAT), desc({0, 2, 4, 4}, DataType::kINT32)};
    void* targets[] = {nullptr, nullptr};
    check(runtime_of(*pool)->enqueue(&empty, outs, &source, targets, nullptr, nullptr) == 0, "an empty batch");
}

}  // namespace

int main(int count, char** words) {
    void* library = count == 2 ? dlopen(words[1], RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (library == nullptr) {
        std::fprintf(stderr, "usage: contract LIBRARY (%s)\n", count == 2 ? dlerror() : "none given");
        return 1;
    }
    auto* get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    auto* set = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    check(get != nullptr && set != nullptr, "the library exports getCreators and setLoggerFinder");
    if (get == nullptr || set == nullptr) return vss::test::result();
    set(&finder);
    int32_t made = 0;
    auto* const* list = get(made);
    for (int32_t i = 0; i < made; ++i) creators.push_back(static_cast<IPluginCreatorV3One*>(list[i]));
    check_catalogue();
    check_bad_fields();
    check_shapes();
    check_known_sides();
    check_types();
    check_serialisation();
    for (const bool half : {false, true}) {
        for (const bool corners : {false, true}) {
            check_labels(half, corners, 17, 29);
            check_labels(half, corners, 4, 6);
            check_labels(half, corners, 3, 140);
        }
        check_pooling(half, 8, 10);
        check_pooling(half, 7, 9);
    }
    check_bad_shapes();
    return vss::test::result();
}
