// The nodes healthgpt::Linear, healthgpt::HLoraLinear and those around them (export/graph/functions.py), for the CPU
// and for a GPU.
#pragma once

#include <array>
#include <iterator>
#include <vector>

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
  bool quick_gelu = false;  // replaces x by x sigmoid(1.702 x)
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
constexpr Operand kLinearInputs[] = {
    {"x", kOrtFloat32},
    {"weight", kOrtUndefined, kOrtRequired, kOrtHostMemory},
    {"weight_scale", kOrtUndefined, kOrtOptional, kOrtHostMemory},
    {"bias", kOrtFloat32, kOrtOptional},
    {"adapter_in", kOrtUndefined, kOrtRequired, kOrtHostMemory},
    {"adapter_in_scale", kOrtUndefined, kOrtOptional, kOrtHostMemory},
    {"adapter_out", kOrtUndefined, kOrtRequired, kOrtHostMemory},
    {"adapter_out_scale", kOrtUndefined, kOrtOptional, kOrtHostMemory},
};

// The inputs of a node: without adapters only the first four; the residual, if it is added, comes last.
template <bool has_adapters, bool has_residual>
constexpr auto InputsOf() {
  constexpr size_t count = has_adapters ? std::size(kLinearInputs) : 4;
  std::array<Operand, count + has_residual> inputs = {};
  for (size_t i = 0; i < count; ++i) inputs[i] = kLinearInputs[i];
  if (has_residual) inputs[count] = {"residual", kOrtFloat32};
  return inputs;
}

// The operands of a node; without experts it has no adapters. Throws if shapes or types do not fit together.
LinearOperands ReadLinear(Call& call, int64_t block_size, int64_t experts, const Around& around);

struct LinearNode {
  static constexpr const char* kName = "Linear";
  static constexpr bool kHasAdapters = false;
  static constexpr Around kAround = {};
};
struct ResidualLinearNode {
  static constexpr const char* kName = "ResidualLinear";
  static constexpr bool kHasAdapters = false;
  static constexpr Around kAround = {false, false, true};
};
struct QuickGeluResidualLinearNode {
  static constexpr const char* kName = "QuickGeluResidualLinear";
  static constexpr bool kHasAdapters = false;
  static constexpr Around kAround = {false, false, true, true};
};
struct HLoraLinearNode {
  static constexpr const char* kName = "HLoraLinear";
  static constexpr bool kHasAdapters = true;
  static constexpr Around kAround = {};
};
struct NormHLoraLinearNode {
  static constexpr const char* kName = "NormHLoraLinear";
  static constexpr bool kHasAdapters = true;
  static constexpr Around kAround = {true, false, false};
};
struct ResidualHLoraLinearNode {
  static constexpr const char* kName = "ResidualHLoraLinear";
  static constexpr bool kHasAdapters = true;
  static constexpr Around kAround = {false, false, true};
};
struct SwigluResidualHLoraLinearNode {
  static constexpr const char* kName = "SwigluResidualHLoraLinear";
  static constexpr bool kHasAdapters = true;
  static constexpr Around kAround = {false, true, true};
};

// A Launcher(attributes, has_adapters) is made with the session and called as launcher(operands, call).
template <class Launcher, class Node>
class LinearKernel {
  static constexpr auto kOperands = InputsOf<Node::kHasAdapters, Node::kAround.residual>();

 public:
  static constexpr const char* kName = Node::kName;
  static constexpr const auto& kInputs = kOperands;
  static constexpr Operand kOutputs[] = {{"y", kOrtFloat32}};

  // Float matrices have no blocks, so they ignore the attribute.
  explicit LinearKernel(const Attributes& attributes)
      : block_size_(attributes.Integer("block_size", 0, INT64_MAX)),
        experts_(Node::kHasAdapters ? attributes.Integer("experts", 1, INT32_MAX) : 0),
        launcher_(attributes, Node::kHasAdapters) {
    if (around_.normalise) around_.epsilon = attributes.Positive("epsilon");
  }

  void Compute(Call& call) const { launcher_(ReadLinear(call, block_size_, experts_, around_), call); }

 private:
  int64_t block_size_, experts_;
  Around around_ = Node::kAround;
  Launcher launcher_;
};

// The operators of some nodes, by one launcher.
template <class Launcher, class... Nodes>
std::vector<const OrtCustomOp*> LinearOperatorsOf() {
  return {Operator<LinearKernel<Launcher, Nodes>>()...};
}
template <class Launcher>
std::vector<const OrtCustomOp*> HLoraLinearOperators() {
  return LinearOperatorsOf<Launcher, HLoraLinearNode, NormHLoraLinearNode, ResidualHLoraLinearNode,
                           SwigluResidualHLoraLinearNode>();
}

}  // namespace healthgpt
