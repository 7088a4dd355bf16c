#include "onnxruntime/operator.h"

#include <atomic>
#include <cfloat>
#include <charconv>
#include <exception>

namespace healthgpt {
namespace {

std::string Brackets(const int64_t* shape, size_t rank) {
  std::string text = "[";
  for (size_t i = 0; i < rank; ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

// The type and shape of a value. ONNX Runtime's description is released at the end of its scope.
class Description {
 public:
  Description(const OrtApi& api, const OrtValue* value) : api_(api) {
    Check(api, api.GetTensorTypeAndShape(value, &info_));
  }
  ~Description() { api_.ReleaseTensorTypeAndShapeInfo(info_); }
  Description(const Description&) = delete;
  Description& operator=(const Description&) = delete;

  const OrtTensorTypeAndShapeInfo* info() const { return info_; }

 private:
  const OrtApi& api_;
  OrtTensorTypeAndShapeInfo* info_ = nullptr;
};

Tensor Read(const OrtApi& api, const Operand& operand, const OrtValue* value) {
  Tensor tensor;
  tensor.name = operand.name;
  const Description description(api, value);
  Check(api, api.GetTensorElementType(description.info(), &tensor.type));
  if (operand.type != kOrtUndefined && tensor.type != operand.type) {
    throw std::invalid_argument(std::string(operand.name) + " must have the ONNX type " + std::to_string(operand.type) +
                                ", found " + std::to_string(tensor.type));
  }
  Check(api, api.GetDimensionsCount(description.info(), &tensor.rank));
  if (tensor.rank > Tensor::kMostDimensions) {
    throw std::invalid_argument(std::string(operand.name) + " must have at most " +
                                std::to_string(Tensor::kMostDimensions) + " dimensions, found " +
                                std::to_string(tensor.rank));
  }
  Check(api, api.GetDimensions(description.info(), tensor.shape, tensor.rank));
  size_t elements = 0;
  Check(api, api.GetTensorShapeElementCount(description.info(), &elements));
  tensor.elements = static_cast<int64_t>(elements);
  // No function gives const memory. A kernel never writes to an input, unless the same memory is its output.
  Check(api, api.GetTensorMutableData(const_cast<OrtValue*>(value), &tensor.data));
  tensor.given = true;
  return tensor;
}

}  // namespace

void Check(const OrtApi& api, OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw std::runtime_error(message);
}

std::string Tensor::ShapeText() const { return Brackets(shape, rank); }

void Tensor::Expect(const int64_t* expected, size_t expected_rank) const {
  bool same = rank == expected_rank;
  for (size_t i = 0; same && i < rank; ++i) same = shape[i] == expected[i];
  if (!same) {
    throw std::invalid_argument(std::string(name) + " must be " + Brackets(expected, expected_rank) + ", found " +
                                ShapeText());
  }
}

int64_t Attributes::Integer(const char* name, int64_t smallest, int64_t largest) const {
  int64_t value = 0;
  Check(api_, api_.KernelInfoGetAttribute_int64(info_, name, &value));
  if (value < smallest || value > largest) {
    throw std::invalid_argument(std::string(name) + " must be from " + std::to_string(smallest) + " to " +
                                std::to_string(largest) + ", found " + std::to_string(value));
  }
  return value;
}

float Attributes::Positive(const char* name) const {
  float value = 0.0f;
  Check(api_, api_.KernelInfoGetAttribute_float(info_, name, &value));
  if (!(value >= 0.0f && value <= FLT_MAX)) {
    throw std::invalid_argument(std::string(name) + " must be 0 or a positive number, found " + std::to_string(value));
  }
  return value;
}

Tensor Attributes::Constant(size_t index, const Operand& operand) const {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  Check(api_, api_.KernelInfoGetConstantInput_tensor(info_, index, &is_constant, &value));
  return is_constant != 0 && value != nullptr ? Read(api_, operand, value) : Tensor();
}

size_t Attributes::Threads() const {
  static constexpr char kKey[] = "healthgpt.threads";
  static constexpr size_t kDefault = 8, kMost = 4096;
  OrtKeyValuePairs* entries = nullptr;
  Check(api_, api_.KernelInfo_GetConfigEntries(info_, &entries));
  const char* given = api_.GetKeyValue(entries, kKey);
  const std::string text = given == nullptr ? std::to_string(kDefault) : given;
  api_.ReleaseKeyValuePairs(entries);
  size_t threads = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), threads);
  if (error != std::errc() || end != text.data() + text.size() || threads < 1 || threads > kMost) {
    throw std::invalid_argument(std::string(kKey) + " must be from 1 to " + std::to_string(kMost) + ", found \"" +
                                text + "\"");
  }
  return threads;
}

Tensor Call::Input(size_t index) const {
  const Operand& operand = inputs_[index];
  const OrtValue* value = nullptr;
  Check(api_, api_.KernelContext_GetInput(context_, index, &value));
  if (value != nullptr) return Read(api_, operand, value);
  if (operand.characteristic != kOrtOptional) throw std::invalid_argument(std::string(operand.name) + " is missing");
  Tensor tensor;
  tensor.name = operand.name;
  return tensor;
}

void* Call::Stream() const {
  void* stream = nullptr;
  Check(api_, api_.KernelContext_GetGPUComputeStream(context_, &stream));
  return stream;
}

void* Call::Output(size_t index, const int64_t* shape, size_t rank) const {
  OrtValue* value = nullptr;
  void* data = nullptr;
  Check(api_, api_.KernelContext_GetOutput(context_, index, shape, rank, &value));
  Check(api_, api_.GetTensorMutableData(value, &data));
  return data;
}

void Call::Run(void* call, size_t count, Parallel::Task task, void* state) {
  const Call& self = *static_cast<const Call*>(call);
  // Exceptions must not reach ONNX Runtime's threads: the first is thrown again on the caller's thread.
  struct Shared {
    Parallel::Task task;
    void* state;
    std::atomic<bool> failed;
    std::exception_ptr error;
  } shared = {task, state, {false}, {}};
  const auto run = [](void* pointer, size_t index) {
    Shared& work = *static_cast<Shared*>(pointer);
    try {
      work.task(work.state, index);
    } catch (...) {
      if (!work.failed.exchange(true)) work.error = std::current_exception();
    }
  };
  Check(self.api_, self.api_.KernelContext_ParallelFor(self.context_, run, count, 0, &shared));
  if (shared.error) std::rethrow_exception(shared.error);
}

}  // namespace healthgpt
