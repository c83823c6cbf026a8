// Timing program for devices without Python: calls of an ONNX file in ONNX Runtime, by its C API.
//
//   time_onnx MODEL.onnx|- [--threads=1] [--batch=1] [--calls=100] [--warmup=10] [--open-axes=N] [--provider=NAME]
//
// "-" reads the file from standard input. The last line of the output is what `deploy.command` of compress expects:
//
//   {"milliseconds": [3.104, 3.098], "sha256": "9f86d0...", "runtime": "onnxruntime 1.23.2"}
//
// The batch axis of an input takes --batch. Other open axes need --open-axes, such as the side of an image. Operators
// run one after the other. A provider such as XNNPACK or QNN must be part of the library.

#include <onnxruntime_c_api.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int64_t kLargest = 1000000;

struct Options {
  std::string model;
  std::string provider;
  int64_t threads = 1;
  int64_t batch = 1;
  int64_t calls = 100;
  int64_t warmup = 10;
  int64_t open_axes = 0;
};

[[noreturn]] void Fail(const std::string& text) { throw std::runtime_error(text); }

int64_t ReadCount(const std::string& name, const std::string& text, int64_t least) {
  char* end = nullptr;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < least || value > kLargest) {
    Fail(name + " must be a whole number from " + std::to_string(least) + " to " + std::to_string(kLargest) +
         ", got '" + text + "'.");
  }
  return value;
}

Options ReadOptions(int count, char** arguments) {
  Options found;
  for (int number = 1; number < count; ++number) {
    const std::string argument = arguments[number];
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : argument.substr(equals + 1);
    if (name == "--threads") {
      found.threads = ReadCount(name, value, 1);
    } else if (name == "--batch") {
      found.batch = ReadCount(name, value, 1);
    } else if (name == "--calls") {
      found.calls = ReadCount(name, value, 1);
    } else if (name == "--warmup") {
      found.warmup = ReadCount(name, value, 0);
    } else if (name == "--open-axes") {
      found.open_axes = ReadCount(name, value, 1);
    } else if (name == "--provider") {
      found.provider = value;
    } else if (argument.size() > 1 && argument[0] == '-') {
      Fail("Unknown option '" + argument + "'.");
    } else if (found.model.empty()) {
      found.model = argument;
    } else {
      Fail("One model must be given, got '" + found.model + "' and '" + argument + "'.");
    }
  }
  if (found.model.empty()) {
    Fail("usage: time_onnx MODEL.onnx|- [--threads=1] [--batch=1] [--calls=100] [--warmup=10] [--open-axes=N] "
         "[--provider=NAME]");
  }
  return found;
}

// SHA-256 (FIPS 180-4).
class Sha256 {
 public:
  static std::string Of(const std::vector<char>& content) {
    Sha256 state;
    std::vector<uint8_t> padded(content.begin(), content.end());
    const uint64_t bits = static_cast<uint64_t>(content.size()) * 8;
    padded.push_back(0x80);
    while (padded.size() % 64 != 56) padded.push_back(0);
    for (int shift = 56; shift >= 0; shift -= 8) padded.push_back(static_cast<uint8_t>(bits >> shift));
    for (size_t place = 0; place < padded.size(); place += 64) state.Add(&padded[place]);
    std::string text;
    char digits[9];
    for (const uint32_t word : state.words_) {
      std::snprintf(digits, sizeof digits, "%08x", static_cast<unsigned>(word));
      text += digits;
    }
    return text;
  }

 private:
  static uint32_t Turn(uint32_t value, int places) { return value >> places | value << (32 - places); }

  void Add(const uint8_t* block) {
    static constexpr std::array<uint32_t, 64> kConstants = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    std::array<uint32_t, 64> w{};
    for (int i = 0; i < 16; ++i) {
      w[i] = static_cast<uint32_t>(block[4 * i]) << 24 | static_cast<uint32_t>(block[4 * i + 1]) << 16 |
             static_cast<uint32_t>(block[4 * i + 2]) << 8 | block[4 * i + 3];
    }
    for (int i = 16; i < 64; ++i) {
      const uint32_t s0 = Turn(w[i - 15], 7) ^ Turn(w[i - 15], 18) ^ w[i - 15] >> 3;
      const uint32_t s1 = Turn(w[i - 2], 17) ^ Turn(w[i - 2], 19) ^ w[i - 2] >> 10;
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    auto [a, b, c, d, e, f, g, h] = words_;
    for (int i = 0; i < 64; ++i) {
      const uint32_t s1 = Turn(e, 6) ^ Turn(e, 11) ^ Turn(e, 25);
      const uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + kConstants[i] + w[i];
      const uint32_t t2 = (Turn(a, 2) ^ Turn(a, 13) ^ Turn(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    const std::array<uint32_t, 8> added = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; ++i) words_[i] += added[i];
  }

  std::array<uint32_t, 8> words_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
};

std::vector<char> ReadModel(const std::string& path) {
  if (path == "-") {
    return {std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>()};
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) Fail("Model '" + path + "' cannot be read.");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

const OrtApi* api = nullptr;

void Check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string text = api->GetErrorMessage(status);
  api->ReleaseStatus(status);
  Fail("ONNX Runtime: " + text);
}

size_t SizeOf(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL:
      return 1;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return 2;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
      return 4;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE:
      return 8;
    default:
      Fail("Inputs must be numbers of 8 to 64 bits.");
  }
}

// Fills a tensor: small numbers of both signs for floats, ones for integers. Zeros would be faster on some devices.
void Fill(std::vector<char>& bytes, ONNXTensorElementDataType type, size_t count) {
  uint32_t state = 1;
  for (size_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    const float value = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
    if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
      std::memcpy(&bytes[4 * i], &value, 4);
    } else if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE) {
      const double wide = value;
      std::memcpy(&bytes[8 * i], &wide, 8);
    } else if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) {
      const uint16_t half = static_cast<uint16_t>((value < 0 ? 0x8000u : 0u) | 0x3400u | (state >> 20 & 0x3ffu));
      std::memcpy(&bytes[2 * i], &half, 2);
    } else {
      bytes[SizeOf(type) * i] = 1;
    }
  }
}

struct Input {
  std::string name;
  std::vector<char> bytes;
  OrtValue* value = nullptr;
};

Input MakeInput(OrtSession* session, size_t number, const Options& options, OrtAllocator* allocator,
                const OrtMemoryInfo* memory) {
  Input made;
  char* name = nullptr;
  Check(api->SessionGetInputName(session, number, allocator, &name));
  made.name = name;
  Check(api->AllocatorFree(allocator, name));
  OrtTypeInfo* type_info = nullptr;
  Check(api->SessionGetInputTypeInfo(session, number, &type_info));
  const OrtTensorTypeAndShapeInfo* info = nullptr;
  Check(api->CastTypeInfoToTensorInfo(type_info, &info));
  if (info == nullptr) Fail("Input '" + made.name + "' must be a tensor.");
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  Check(api->GetTensorElementType(info, &type));
  size_t rank = 0;
  Check(api->GetDimensionsCount(info, &rank));
  std::vector<int64_t> shape(rank);
  Check(api->GetDimensions(info, shape.data(), rank));
  api->ReleaseTypeInfo(type_info);
  size_t count = 1;
  for (size_t axis = 0; axis < rank; ++axis) {
    if (axis == 0 && shape[0] > 0 && shape[0] != options.batch) {
      Fail("--batch must be " + std::to_string(shape[0]) + ", the fixed batch size of input '" + made.name + "'.");
    }
    if (shape[axis] <= 0) {
      shape[axis] = axis == 0 ? options.batch : options.open_axes;
      if (shape[axis] == 0) Fail("Axis " + std::to_string(axis) + " of '" + made.name + "' is open: set --open-axes.");
    }
    count *= static_cast<size_t>(shape[axis]);
  }
  made.bytes.resize(count * SizeOf(type));
  Fill(made.bytes, type, count);
  Check(api->CreateTensorWithDataAsOrtValue(memory, made.bytes.data(), made.bytes.size(), shape.data(), rank, type,
                                            &made.value));
  return made;
}

std::vector<double> TimeCalls(OrtSession* session, const Options& options) {
  OrtAllocator* allocator = nullptr;
  Check(api->GetAllocatorWithDefaultOptions(&allocator));
  OrtMemoryInfo* memory = nullptr;
  Check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  size_t inputs = 0, outputs = 0;
  Check(api->SessionGetInputCount(session, &inputs));
  Check(api->SessionGetOutputCount(session, &outputs));
  std::vector<Input> made;
  for (size_t number = 0; number < inputs; ++number) {
    made.push_back(MakeInput(session, number, options, allocator, memory));
  }
  std::vector<std::string> output_texts;
  for (size_t number = 0; number < outputs; ++number) {
    char* name = nullptr;
    Check(api->SessionGetOutputName(session, number, allocator, &name));
    output_texts.emplace_back(name);
    Check(api->AllocatorFree(allocator, name));
  }
  std::vector<const char*> input_names, output_names;
  std::vector<const OrtValue*> values;
  for (const Input& one : made) {
    input_names.push_back(one.name.c_str());
    values.push_back(one.value);
  }
  for (const std::string& text : output_texts) output_names.push_back(text.c_str());

  std::vector<double> times;
  std::vector<OrtValue*> results(outputs, nullptr);
  for (int64_t call = -options.warmup; call < options.calls; ++call) {
    const auto started = std::chrono::steady_clock::now();
    Check(api->Run(session, nullptr, input_names.data(), values.data(), inputs, output_names.data(), outputs,
                   results.data()));
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - started;
    if (call >= 0) times.push_back(took.count());
    for (OrtValue*& result : results) {
      api->ReleaseValue(result);
      result = nullptr;
    }
  }
  for (const Input& one : made) api->ReleaseValue(one.value);
  api->ReleaseMemoryInfo(memory);
  return times;
}

int Main(int count, char** arguments) {
  const Options options = ReadOptions(count, arguments);
  const OrtApiBase* base = OrtGetApiBase();
  api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    Fail(std::string("The library is ONNX Runtime ") + base->GetVersionString() + ", older than the header (API " +
         std::to_string(ORT_API_VERSION) + ").");
  }
  const std::vector<char> content = ReadModel(options.model);
  OrtEnv* env = nullptr;
  Check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "time_onnx", &env));
  OrtSessionOptions* settings = nullptr;
  Check(api->CreateSessionOptions(&settings));
  Check(api->SetIntraOpNumThreads(settings, static_cast<int>(options.threads)));
  Check(api->SetSessionExecutionMode(settings, ORT_SEQUENTIAL));
  Check(api->SetSessionGraphOptimizationLevel(settings, ORT_ENABLE_ALL));
  if (!options.provider.empty()) {
    Check(api->SessionOptionsAppendExecutionProvider(settings, options.provider.c_str(), nullptr, nullptr, 0));
  }
  OrtSession* session = nullptr;
  if (options.model == "-") {
    Check(api->CreateSessionFromArray(env, content.data(), content.size(), settings, &session));
  } else {  // by its path, since weights may lie in a second file
    Check(api->CreateSession(env, std::filesystem::path(options.model).c_str(), settings, &session));
  }
  const std::vector<double> times = TimeCalls(session, options);
  std::printf("{\"milliseconds\": [");
  for (size_t number = 0; number < times.size(); ++number) {
    std::printf("%s%.6f", number == 0 ? "" : ", ", times[number]);
  }
  std::printf("], \"sha256\": \"%s\", \"runtime\": \"onnxruntime %s%s%s\"}\n", Sha256::Of(content).c_str(),
              base->GetVersionString(), options.provider.empty() ? "" : " ", options.provider.c_str());
  api->ReleaseSession(session);
  api->ReleaseSessionOptions(settings);
  api->ReleaseEnv(env);
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    return Main(count, arguments);
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
