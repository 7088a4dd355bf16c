// The nodes healthgpt::Linear, healthgpt::HLoraLinear and those around the latter (export/graph/functions.py), for the
// CPU and for a GPU.
#pragma once

#include "hlora_linear/hlora_linear.h"
#include "onnxruntime/operator.h"

namespace healthgpt {

// A matrix (C, O) among a node's inputs, or (O / panel, C, panel) if it is of integers in panels. Integers have scales
// (ceil(C / block_size), O) in float32, or in panels and bfloat16.
struct MatrixOperand {
  const void* values = nullptr;
  const void* scales = nullptr;
  OrtElementType type = kOrtUndefined;  // float32, float16, bfloat16, int8 or int4
  int64_t channels = 0, outputs = 0;
  int64_t block_size = 0;  // 0 for floats
  int64_t panel = 0;       // kPanel, or 0 for row-major order
};

// What a node does around its linear.
struct Around {
  bool normalise = false;   // replaces x by x / sqrt(mean(x^2) + epsilon)
  bool pair_input = false;  // x is (S, 2 C) and stands for silu(x[:, :C]) * x[:, C:]
  bool residual = false;    // is added to the result
  float epsilon = 0;
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
  Around around;
  const float* residual = nullptr;  // (S, O) or null
};

// Matrices stay in the mapped file: a launcher for a GPU copies them itself.
constexpr Operand kHLoraLinearInputs[] = {
    {"x", kOrtFloat32},
    {"weight", kOrtUndefined, kOrtRequired, kOrtHostMemory},
    {"weight_scale", kOrtUndefined, kOrtOptional, kOrtHostMemory},
    {"bias", kOrtFloat32, kOrtOptional},
    {"adapter_in", kOrtUndefined, kOrtRequired, kOrtHostMemory},
    {"adapter_in_scale", kOrtUndefined, kOrtOptional, kOrtHostMemory},
    {"adapter_out", kOrtUndefined, kOrtRequired, kOrtHostMemory},
    {"adapter_out_scale", kOrtUndefined, kOrtOptional, kOrtHostMemory},
    {"residual", kOrtFloat32},
};

// The operands of a node; without experts only the first four inputs. Throws if shapes or types do not fit together.
LinearOperands ReadLinear(Call& call, int64_t block_size, int64_t experts, const Around& around = {});

// A Launcher(attributes, has_adapters) is made with the session and called as launcher(operands, call).
template <class Launcher>
class LinearKernel {
 public:
  static constexpr const char* kName = "Linear";
  static constexpr auto kInputs = FirstOperands<4>(kHLoraLinearInputs);
  static constexpr Operand kOutputs[] = {{"y", kOrtFloat32}};

  // Float matrices have no blocks, so they ignore the attribute.
  explicit LinearKernel(const Attributes& attributes)
      : block_size_(attributes.Integer("block_size", 0, INT64_MAX)), launcher_(attributes, false) {}

  void Compute(Call& call) const { launcher_(ReadLinear(call, block_size_, 0), call); }

 private:
  int64_t block_size_;
  Launcher launcher_;
};

// The nodes with an H-LoRA linear.
struct AloneNode {
  static constexpr const char* kName = "HLoraLinear";
  static constexpr Around kAround = {};
};
struct NormNode {
  static constexpr const char* kName = "NormHLoraLinear";
  static constexpr Around kAround = {true, false, false};
};
struct ResidualNode {
  static constexpr const char* kName = "ResidualHLoraLinear";
  static constexpr Around kAround = {false, false, true};
};
struct SwigluResidualNode {
  static constexpr const char* kName = "SwigluResidualHLoraLinear";
  static constexpr Around kAround = {false, true, true};
};

template <class Launcher, class Node>
class HLoraLinearKernel {
  static constexpr auto kOperands = FirstOperands<Node::kAround.residual ? 9 : 8>(kHLoraLinearInputs);

 public:
  static constexpr const char* kName = Node::kName;
  static constexpr const auto& kInputs = kOperands;
  static constexpr Operand kOutputs[] = {{"y", kOrtFloat32}};

  explicit HLoraLinearKernel(const Attributes& attributes)
      : block_size_(attributes.Integer("block_size", 0, INT64_MAX)),
        experts_(attributes.Integer("experts", 1, INT32_MAX)),
        launcher_(attributes, true) {
    if (around_.normalise) around_.epsilon = attributes.Positive("epsilon");
  }

  void Compute(Call& call) const { launcher_(ReadLinear(call, block_size_, experts_, around_), call); }

 private:
  int64_t block_size_, experts_;
  Around around_ = Node::kAround;
  Launcher launcher_;
};

// The operators of all nodes with an H-LoRA linear, by one launcher.
template <class Launcher>
std::vector<const OrtCustomOp*> HLoraLinearOperators() {
  return {Operator<HLoraLinearKernel<Launcher, AloneNode>>(), Operator<HLoraLinearKernel<Launcher, NormNode>>(),
          Operator<HLoraLinearKernel<Launcher, ResidualNode>>(),
          Operator<HLoraLinearKernel<Launcher, SwigluResidualNode>>()};
}

}  // namespace healthgpt
