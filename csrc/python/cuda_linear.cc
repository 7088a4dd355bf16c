// The H-LoRA linear on a GPU as Python functions, which check shapes and call a launcher.
#include <pybind11/stl.h>

#include "hlora_linear/cuda.h"
#include "hlora_linear/prefill.h"
#include "hlora_linear/rows.h"
#include "python/cuda.h"

namespace py = pybind11;

namespace healthgpt {
namespace {

// A matrix [C, O] in GPU memory, with the Python objects that own the memory.
struct StoredMatrix {
  StoredMatrix(py::object given, const std::string& storage, std::pair<int64_t, int64_t> shape, py::object given_scales,
               int64_t block_size, std::optional<int64_t> stride)
      : values(std::move(given)), scales(std::move(given_scales)) {
    matrix.storage = StorageOf(storage);
    std::tie(matrix.channels, matrix.outputs) = shape;
    matrix.stride = stride.value_or(matrix.outputs);
    matrix.block_size = block_size;
    if (matrix.channels < 1 || matrix.outputs < 1 || matrix.stride < matrix.outputs) {
      throw py::value_error("a matrix must hold numbers, its stride at least its outputs");
    }
    int64_t numbers = 0, all_bits = 0;
    if (__builtin_mul_overflow(matrix.channels, matrix.stride, &numbers) ||
        __builtin_mul_overflow(numbers, cuda::StorageBits(matrix.storage), &all_bits)) {
      throw py::value_error("a matrix must fit into memory, got " + Array::Brackets({matrix.channels, matrix.stride}));
    }
    const int64_t bytes = cuda::CeilDivide(all_bits, 8);
    const Array array = DeviceArray("values", values);
    if (array.bytes() != bytes) {
      throw py::value_error("values must have " + std::to_string(bytes) + " bytes, got " +
                            std::to_string(array.bytes()));
    }
    matrix.values = array.data<void>();
    if (cuda::IsInteger(matrix.storage) == scales.is_none()) {
      throw py::value_error("scales go with integers, and only with them");
    }
    if (scales.is_none()) return;
    if (block_size < 1) throw py::value_error("block_size must be positive, got " + std::to_string(block_size));
    matrix.scales = Floats("scales", scales, {cuda::CeilDivide(matrix.channels, block_size), matrix.outputs});
  }

  py::object values, scales;
  cuda::Matrix matrix;
};

using Arguments = cuda::HLoraLinearArguments;

Arguments Matrices(int64_t rows, const StoredMatrix& weight, const StoredMatrix* adapter_in,
                   const StoredMatrix* adapter_out, int64_t experts) {
  if ((experts > 0) != (adapter_in != nullptr) || (experts > 0) != (adapter_out != nullptr)) {
    throw py::value_error("adapter_in, adapter_out and experts go together");
  }
  Arguments arguments;
  arguments.rows = rows;
  arguments.experts = experts;
  arguments.weight = weight.matrix;
  if (experts > 0) {
    arguments.adapter_in = adapter_in->matrix;
    arguments.adapter_out = adapter_out->matrix;
  }
  return arguments;
}

int64_t LinearWorkspaceBytes(int64_t rows, const StoredMatrix& weight, const StoredMatrix* adapter_in,
                             const StoredMatrix* adapter_out, int64_t experts) {
  return cuda::HLoraLinearWorkspaceBytes(Matrices(rows, weight, adapter_in, adapter_out, experts));
}

// The operands that all launchers have. x is (S, C), or (S, 2 C) for pairs.
Arguments Operands(const py::object& x, const StoredMatrix& weight, const py::object& y, const py::object& bias,
                   const StoredMatrix* adapter_in, const StoredMatrix* adapter_out, int64_t experts,
                   const py::object& expert_of, const py::object& route_bias, std::optional<float> epsilon,
                   bool pair_input, const py::object& residual) {
  const std::vector<int64_t> shape = DeviceArray("x", x).shape();
  if (shape.size() != 2) throw py::value_error("x must have 2 dimensions");
  Arguments arguments = Matrices(shape[0], weight, adapter_in, adapter_out, experts);
  arguments.x = Floats("x", x, {shape[0], weight.matrix.channels * (pair_input ? 2 : 1)});
  arguments.y = Floats("y", y, {shape[0], weight.matrix.outputs});
  arguments.bias = OptionalFloats("bias", bias, {weight.matrix.outputs});
  if (!expert_of.is_none()) {
    const Array given("expert_of", expert_of, kDevice);
    given.Expect({arguments.adapter_out.channels}, Array::kInt, 32);
    arguments.expert_of = given.data<int32_t>();
  }
  arguments.route_bias = OptionalFloats("route_bias", route_bias, {experts});
  arguments.normalise = epsilon.has_value();
  arguments.epsilon = epsilon.value_or(0.0f);
  arguments.pair_input = pair_input;
  arguments.residual = OptionalFloats("residual", residual, {arguments.rows, weight.matrix.outputs});
  return arguments;
}

void GiveWorkspace(const py::object& workspace, Arguments& arguments) {
  const Array memory = DeviceArray("workspace", workspace);
  arguments.workspace = memory.data<void>();
  arguments.workspace_bytes = memory.bytes();
}

void HLoraLinear(const py::object& x, const StoredMatrix& weight, const py::object& y, const py::object& workspace,
                 const py::object& bias, const StoredMatrix* adapter_in, const StoredMatrix* adapter_out,
                 int64_t experts, const py::object& expert_of, const py::object& route_bias,
                 std::optional<float> epsilon, bool pair_input, const py::object& residual, uintptr_t stream) {
  Arguments arguments = Operands(x, weight, y, bias, adapter_in, adapter_out, experts, expert_of, route_bias, epsilon,
                                 pair_input, residual);
  GiveWorkspace(workspace, arguments);
  Raise(cuda::HLoraLinear(arguments, StreamOf(stream)));
}

#ifndef HEALTHGPT_WITHOUT_CUBLASLT
int64_t PrefillWorkspaceBytes(int64_t rows, const StoredMatrix& weight, const StoredMatrix* adapter_in,
                              const StoredMatrix* adapter_out, int64_t experts) {
  return cuda::HLoraPrefillWorkspaceBytes(Matrices(rows, weight, adapter_in, adapter_out, experts));
}

void HLoraPrefill(const py::object& x, const StoredMatrix& weight, const py::object& y, const py::object& workspace,
                  const py::object& bias, const StoredMatrix* adapter_in, const StoredMatrix* adapter_out,
                  int64_t experts, const py::object& expert_of, const py::object& route_bias,
                  std::optional<float> epsilon, bool pair_input, const py::object& residual, uintptr_t stream) {
  Arguments arguments = Operands(x, weight, y, bias, adapter_in, adapter_out, experts, expert_of, route_bias, epsilon,
                                 pair_input, residual);
  GiveWorkspace(workspace, arguments);
  Raise(cuda::HLoraPrefill(arguments, StreamOf(stream)));
}

void HLoraLinearRows(const py::object& x, const StoredMatrix& weight, const py::object& y, const py::object& bias,
                     const StoredMatrix* adapter_in, const StoredMatrix* adapter_out, int64_t experts,
                     const py::object& expert_of, const py::object& route_bias, std::optional<float> epsilon,
                     bool pair_input, const py::object& residual, uintptr_t stream) {
  const Arguments arguments = Operands(x, weight, y, bias, adapter_in, adapter_out, experts, expert_of, route_bias,
                                       epsilon, pair_input, residual);
  Raise(cuda::HLoraLinearRows(arguments, KeptWorkspaces(), StreamOf(stream)));
}
#endif

}  // namespace

void BindLinear(py::module_& module) {
  py::class_<StoredMatrix>(
      module, "Matrix",
      "A matrix [C, O] on the GPU as the exporter stores it: `values` hold float16, bfloat16, int8 "
      "or (two per byte) int4, whatever type the array calls them; rows are `stride` apart.")
      .def(py::init<py::object, const std::string&, std::pair<int64_t, int64_t>, py::object, int64_t,
                    std::optional<int64_t>>(),
           py::arg("values"), py::arg("storage"), py::arg("shape"), py::arg("scales") = py::none(),
           py::arg("block_size") = 0, py::arg("stride") = py::none());
  module.def("hlora_linear_workspace_bytes", &LinearWorkspaceBytes, py::arg("rows"), py::arg("weight"),
             py::arg("adapter_in") = py::none(), py::arg("adapter_out") = py::none(), py::arg("experts") = 0,
             "Bytes of workspace for at most this many rows; they must be zeros before the first use.");
  module.def("hlora_linear", &HLoraLinear, py::arg("x"), py::arg("weight"), py::arg("y"), py::arg("workspace"),
             py::arg("bias") = py::none(), py::arg("adapter_in") = py::none(), py::arg("adapter_out") = py::none(),
             py::arg("experts") = 0, py::arg("expert_of") = py::none(), py::arg("route_bias") = py::none(),
             py::arg("epsilon") = py::none(), py::arg("pair_input") = false, py::arg("residual") = py::none(),
             py::arg("stream") = 0,
             "y [S, O] = x W + b + gate(x R) * (x A) B for at most 32 rows. Operands as in csrc/hlora_linear/cuda.h; "
             "with an epsilon x is normalised.");
#ifndef HEALTHGPT_WITHOUT_CUBLASLT
  module.def("hlora_prefill_workspace_bytes", &PrefillWorkspaceBytes, py::arg("rows"), py::arg("weight"),
             py::arg("adapter_in") = py::none(), py::arg("adapter_out") = py::none(), py::arg("experts") = 0,
             "Bytes of workspace for this many rows.");
  module.def("hlora_prefill", &HLoraPrefill, py::arg("x"), py::arg("weight"), py::arg("y"), py::arg("workspace"),
             py::arg("bias") = py::none(), py::arg("adapter_in") = py::none(), py::arg("adapter_out") = py::none(),
             py::arg("experts") = 0, py::arg("expert_of") = py::none(), py::arg("route_bias") = py::none(),
             py::arg("epsilon") = py::none(), py::arg("pair_input") = false, py::arg("residual") = py::none(),
             py::arg("stream") = 0,
             "y [S, O] = x W + b + gate(x R) * (x A) B for many rows, by cuBLASLt. Operands as in "
             "csrc/hlora_linear/cuda.h.");
  module.def("hlora_linear_rows", &HLoraLinearRows, py::arg("x"), py::arg("weight"), py::arg("y"),
             py::arg("bias") = py::none(), py::arg("adapter_in") = py::none(), py::arg("adapter_out") = py::none(),
             py::arg("experts") = 0, py::arg("expert_of") = py::none(), py::arg("route_bias") = py::none(),
             py::arg("epsilon") = py::none(), py::arg("pair_input") = false, py::arg("residual") = py::none(),
             py::arg("stream") = 0,
             "y [S, O] = x W + b + gate(x R) * (x A) B for any number of rows, with its own working memory for each "
             "stream. Operands as in csrc/hlora_linear/cuda.h.");
  module.attr("hlora_linear_version") = cuda::kHLoraLinearVersion;
#endif
}

}  // namespace healthgpt
