// The nodes healthgpt::Linear and healthgpt::HLoraLinear (export/graph/functions.py), for the CPU and for a GPU.
#pragma once

#include "onnxruntime/operator.h"

namespace healthgpt {

// A matrix (C, O) among a node's inputs. Integers have scales (ceil(C / block_size), O).
struct MatrixOperand {
  const void* values = nullptr;
  const float* scales = nullptr;
  OrtElementType type = kOrtUndefined;  // float32, float16, bfloat16, int8 or int4
  int64_t channels = 0, outputs = 0;
  int64_t block_size = 0;  // 0 for floats
};

struct LinearOperands {
  int64_t rows = 0;
  const float* x = nullptr;  // (S, C)
  MatrixOperand weight;
  const float* bias = nullptr;  // (O) or null
  float* y = nullptr;           // (S, O)
  int64_t experts = 0;          // 0 for a linear without adapters
  MatrixOperand adapter_in;     // (C, R + E)
  MatrixOperand adapter_out;    // (R, O)
};

constexpr Operand kHLoraLinearInputs[] = {
    {"x", kOrtFloat32},
    {"weight", kOrtUndefined},
    {"weight_scale", kOrtFloat32, kOrtOptional},
    {"bias", kOrtFloat32, kOrtOptional},
    {"adapter_in", kOrtUndefined},
    {"adapter_in_scale", kOrtFloat32, kOrtOptional},
    {"adapter_out", kOrtUndefined},
    {"adapter_out_scale", kOrtFloat32, kOrtOptional},
};

// The operands of a node; without experts only the first four inputs. Throws if shapes or types do not fit together.
LinearOperands ReadLinear(Call& call, int64_t block_size, int64_t experts);

// A Launcher(attributes, has_adapters) is made with the session and called as launcher(operands, call).
template <class Launcher>
class LinearKernel {
 public:
  static constexpr const char* kName = "Linear";
  static constexpr Operand kInputs[] = {kHLoraLinearInputs[0], kHLoraLinearInputs[1], kHLoraLinearInputs[2],
                                        kHLoraLinearInputs[3]};
  static constexpr Operand kOutputs[] = {{"y", kOrtFloat32}};

  // Float matrices have no blocks, so they ignore the attribute.
  explicit LinearKernel(const Attributes& attributes)
      : block_size_(attributes.Integer("block_size", 0, INT64_MAX)), launcher_(attributes, false) {}

  void Compute(Call& call) const { launcher_(ReadLinear(call, block_size_, 0), call); }

 private:
  int64_t block_size_;
  Launcher launcher_;
};

template <class Launcher>
class HLoraLinearKernel {
 public:
  static constexpr const char* kName = "HLoraLinear";
  static constexpr auto& kInputs = kHLoraLinearInputs;
  static constexpr Operand kOutputs[] = {{"y", kOrtFloat32}};

  explicit HLoraLinearKernel(const Attributes& attributes)
      : block_size_(attributes.Integer("block_size", 0, INT64_MAX)),
        experts_(attributes.Integer("experts", 1, INT32_MAX)),
        launcher_(attributes, true) {}

  void Compute(Call& call) const { launcher_(ReadLinear(call, block_size_, experts_), call); }

 private:
  int64_t block_size_, experts_;
  Launcher launcher_;
};

}  // namespace healthgpt
