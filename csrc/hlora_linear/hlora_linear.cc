#include "hlora_linear/hlora_linear.h"

#include <algorithm>
#include <cmath>

namespace healthgpt {
namespace {

// out += x[channel] * matrix[channel, :], walking the matrix in memory order.
void AccumulateProduct(const float* __restrict__ x, const float* __restrict__ matrix, int64_t channels, int64_t outputs,
                       float* __restrict__ out) {
  for (int64_t channel = 0; channel < channels; ++channel) {
    const float scale = x[channel];
    const float* row = matrix + channel * outputs;
    for (int64_t output = 0; output < outputs; ++output) out[output] += scale * row[output];
  }
}

// low (R + E): A x, then the router's logits. Each expert owns R / E neighbouring entries of A x and scales them by
// its share of the softmax.
void ApplyGate(const HLoraLinearShape& shape, float* low) {
  float* routes = low + shape.rank;
  const float largest = *std::max_element(routes, routes + shape.experts);
  float total = 0.0f;
  for (int64_t expert = 0; expert < shape.experts; ++expert) {
    routes[expert] = std::exp(routes[expert] - largest);
    total += routes[expert];
  }
  const int64_t width = shape.rank / shape.experts;
  for (int64_t expert = 0; expert < shape.experts; ++expert) {
    const float gate = routes[expert] / total;
    for (int64_t i = 0; i < width; ++i) low[expert * width + i] *= gate;
  }
}

}  // namespace

void HLoraLinear(const HLoraLinearShape& shape, const float* x, const float* weight, const float* bias,
                 const float* adapter_in, const float* adapter_out, float* workspace, float* y) {
  const int64_t low_size = shape.rank + shape.experts;
  for (int64_t row = 0; row < shape.rows; ++row) {
    const float* x_row = x + row * shape.channels;
    float* y_row = y + row * shape.outputs;
    std::fill_n(workspace, low_size, 0.0f);
    AccumulateProduct(x_row, adapter_in, shape.channels, low_size, workspace);
    ApplyGate(shape, workspace);
    if (bias != nullptr) {
      std::copy_n(bias, shape.outputs, y_row);
    } else {
      std::fill_n(y_row, shape.outputs, 0.0f);
    }
    AccumulateProduct(x_row, weight, shape.channels, shape.outputs, y_row);
    AccumulateProduct(workspace, adapter_out, shape.rank, shape.outputs, y_row);
  }
}

}  // namespace healthgpt
