// Turns a kernel class into an ONNX Runtime operator.
//
// A kernel class names its inputs and outputs, reads its attributes in the constructor, and computes in Compute:
//
//   struct Kernel {
//     static constexpr const char* kName;
//     static constexpr Operand kInputs[], kOutputs[];
//     explicit Kernel(const Attributes& attributes);
//     void Compute(Call& call) const;
//   };
//   const OrtCustomOp* op = Operator<Kernel>();
//
// Both throw if anything is wrong. Here the exception becomes a status, which ONNX Runtime raises where the session is
// used. A graph may come from anyone, so a kernel checks every shape before it passes a pointer on.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "onnxruntime/abi.h"
#include "parallel.h"

namespace healthgpt {

// Each library of kernels defines these two.
const char* Provider();  // the execution provider of its kernels; null for the CPU
std::vector<const OrtCustomOp*> Operators();

struct Operand {
  const char* name;
  OrtElementType type;  // kOrtUndefined accepts every type
  OrtCharacteristic characteristic = kOrtRequired;
  OrtMemoryType memory = kOrtDefaultMemory;  // where ONNX Runtime puts it
};

// The first of some operands, for nodes that differ in their number.
template <size_t count, size_t all>
constexpr std::array<Operand, count> FirstOperands(const Operand (&operands)[all]) {
  static_assert(count <= all);
  std::array<Operand, count> first = {};
  for (size_t i = 0; i < count; ++i) first[i] = operands[i];
  return first;
}

// A view of an input.
struct Tensor {
  static constexpr size_t kMostDimensions = 8;

  const char* name = "";
  bool given = false;  // false for an optional input that is absent
  OrtElementType type = kOrtUndefined;
  size_t rank = 0;
  int64_t shape[kMostDimensions] = {};
  int64_t elements = 0;
  void* data = nullptr;

  template <class Type>
  const Type* As() const {
    return static_cast<const Type*>(data);
  }
  std::string ShapeText() const;
  // Throws unless the shape is the one expected.
  void Expect(const int64_t* expected, size_t expected_rank) const;
  void Expect(std::initializer_list<int64_t> expected) const { Expect(expected.begin(), expected.size()); }
};

// Throws if ONNX Runtime gave an error.
void Check(const OrtApi& api, OrtStatus* status);

class Attributes {
 public:
  Attributes(const OrtApi& api, const OrtKernelInfo* info) : api_(api), info_(info) {}
  // The integer attribute `name`. Throws if it is missing or out of range.
  int64_t Integer(const char* name, int64_t smallest, int64_t largest) const;
  // The float attribute `name`. Throws if it is missing, negative or not finite.
  float Positive(const char* name) const;
  // The input at `index`; not `given` if it is not a constant of the graph.
  Tensor Constant(size_t index, const Operand& operand) const;
  // The threads of the session, which its configuration must name, for ONNX Runtime does not tell; else a default.
  size_t Threads() const;

 private:
  const OrtApi& api_;
  const OrtKernelInfo* info_;
};

// One call of a kernel: its inputs, its outputs, and its threads.
class Call {
 public:
  Call(const OrtApi& api, OrtKernelContext* context, const Operand* inputs, size_t threads)
      : api_(api), context_(context), inputs_(inputs), threads_(threads) {}

  Tensor Input(size_t index) const;
  // The memory of an output of this shape: new, or bound by the caller.
  void* Output(size_t index, const int64_t* shape, size_t rank) const;

  // ONNX Runtime's own threads, so that --threads applies to all nodes.
  Parallel Threads() { return Parallel(this, &Call::Run, threads_); }

  // The CUDA stream of this call; null on the CPU.
  void* Stream() const;

 private:
  static void Run(void* call, size_t count, Parallel::Task task, void* state);

  const OrtApi& api_;
  OrtKernelContext* context_;
  const Operand* inputs_;
  size_t threads_;
};

// Runs `function` and returns its exception, if any, as a status.
template <class Function>
OrtStatus* Guarded(const OrtApi& api, const char* name, Function function) noexcept {
  try {
    function();
    return nullptr;
  } catch (const std::exception& error) {
    try {
      return api.CreateStatus(kOrtInvalidArgument, (std::string(name) + ": " + error.what()).c_str());
    } catch (...) {  // no memory for the message
    }
  } catch (...) {
  }
  return api.CreateStatus(kOrtFail, name);
}

template <class Kernel>
struct LoadedKernel {
  const OrtApi& api;
  size_t threads;
  Kernel kernel;
};

// The operator of `Kernel`. It lives as long as the library.
template <class Kernel>
const OrtCustomOp* Operator() {
  static const OrtCustomOp op = [] {
    OrtCustomOp description = {};
    description.version = kOrtCustomOpVersion;
    description.GetName = [](const OrtCustomOp*) { return Kernel::kName; };
    description.GetExecutionProviderType = [](const OrtCustomOp*) { return Provider(); };
    description.GetInputTypeCount = [](const OrtCustomOp*) { return std::size(Kernel::kInputs); };
    description.GetInputType = [](const OrtCustomOp*, size_t index) { return Kernel::kInputs[index].type; };
    description.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
      return Kernel::kInputs[index].characteristic;
    };
    description.GetInputMemoryType = [](const OrtCustomOp*, size_t index) { return Kernel::kInputs[index].memory; };
    description.GetOutputTypeCount = [](const OrtCustomOp*) { return std::size(Kernel::kOutputs); };
    description.GetOutputType = [](const OrtCustomOp*, size_t index) { return Kernel::kOutputs[index].type; };
    description.GetOutputCharacteristic = [](const OrtCustomOp*, size_t index) {
      return Kernel::kOutputs[index].characteristic;
    };
    description.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** made) {
      return Guarded(*api, Kernel::kName, [&] {
        const Attributes attributes(*api, info);
        *made = new LoadedKernel<Kernel>{*api, attributes.Threads(), Kernel(attributes)};
      });
    };
    description.KernelComputeV2 = [](void* made, OrtKernelContext* context) {
      const auto& loaded = *static_cast<const LoadedKernel<Kernel>*>(made);
      return Guarded(loaded.api, Kernel::kName, [&] {
        Call call(loaded.api, context, std::data(Kernel::kInputs), loaded.threads);
        loaded.kernel.Compute(call);
      });
    };
    description.KernelDestroy = [](void* made) { delete static_cast<LoadedKernel<Kernel>*>(made); };
    return description;
  }();
  return &op;
}

}  // namespace healthgpt
