// healthgpt_edge._kernels: the launchers as Python functions on NumPy arrays. Checks shapes, then calls; no arithmetic.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "hlora_linear/hlora_linear.h"

namespace py = pybind11;
using Matrix = py::array_t<float, py::array::c_style | py::array::forcecast>;

namespace {

void CheckShape(const char* name, const Matrix& array, std::vector<int64_t> expected) {
  std::string wanted, found;
  bool same = array.ndim() == static_cast<py::ssize_t>(expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    wanted += (i ? ", " : "") + std::to_string(expected[i]);
    same = same && array.shape(static_cast<py::ssize_t>(i)) == expected[i];
  }
  for (py::ssize_t i = 0; i < array.ndim(); ++i) found += (i ? ", " : "") + std::to_string(array.shape(i));
  if (!same) {
    throw py::value_error("[hlora_linear] " + std::string(name) + " must be [" + wanted + "], got [" + found + "]");
  }
}

Matrix HLoraLinear(const Matrix& x, const Matrix& weight, const std::optional<Matrix>& bias, const Matrix& adapter_in,
                   const Matrix& adapter_out, int64_t experts) {
  if (x.ndim() != 2 || weight.ndim() != 2 || adapter_out.ndim() != 2) {
    throw py::value_error("[hlora_linear] x, weight and adapter_out must have 2 dimensions");
  }
  const healthgpt::HLoraLinearShape shape{x.shape(0), x.shape(1), weight.shape(1), adapter_out.shape(0), experts};
  if (experts < 1 || shape.rank % experts != 0) {
    throw py::value_error("[hlora_linear] rank must be a multiple of experts, got " + std::to_string(shape.rank) +
                          " and " + std::to_string(experts));
  }
  CheckShape("weight", weight, {shape.channels, shape.outputs});
  CheckShape("adapter_in", adapter_in, {shape.channels, shape.rank + experts});
  CheckShape("adapter_out", adapter_out, {shape.rank, shape.outputs});
  if (bias) CheckShape("bias", *bias, {shape.outputs});
  Matrix y({shape.rows, shape.outputs});
  std::vector<float> workspace(static_cast<size_t>(shape.rank + experts));
  float* out = y.mutable_data();
  {
    py::gil_scoped_release release;
    healthgpt::HLoraLinear(shape, x.data(), weight.data(), bias ? bias->data() : nullptr, adapter_in.data(),
                           adapter_out.data(), workspace.data(), out);
  }
  return y;
}

}  // namespace

PYBIND11_MODULE(_kernels, module) {
  module.def("hlora_linear", &HLoraLinear, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("adapter_in"),
             py::arg("adapter_out"), py::arg("experts"),
             "y [S, O] = x W + b + gate(x R) * (x A) B, float32; operands as in csrc/hlora_linear/hlora_linear.h.");
}
