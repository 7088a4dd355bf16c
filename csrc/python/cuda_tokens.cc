// The choice of a token and the lookup of table rows on a GPU as Python functions, which check shapes and call a
// launcher.
#include <pybind11/stl.h>

#include "gather_rows/cuda.h"
#include "python/cuda.h"
#include "token_selection/cuda.h"

namespace py = pybind11;

namespace healthgpt {
namespace {

int64_t* Integers(const char* name, const py::object& object, const std::vector<int64_t>& shape) {
  return DeviceArray(name, object).Expect(shape, Array::kInt, 64).data<int64_t>();
}

void GatherRows(const py::object& ids, const py::object& table, const py::object& output, const std::string& storage,
                bool widen, uintptr_t stream) {
  const Array from = DeviceArray("table", table), to = DeviceArray("output", output), at = DeviceArray("ids", ids);
  if (from.shape().size() != 2 || at.shape().size() != 1) {
    throw py::value_error("table must have 2 dimensions, ids 1");
  }
  cuda::GatherRowsArguments arguments;
  arguments.storage = StorageOf(storage);
  arguments.widen = widen;
  arguments.rows = from.shape()[0];
  arguments.channels = from.shape()[1];
  arguments.count = at.shape()[0];
  const int bits = arguments.storage == cuda::Storage::kFloat32 ? 32 : 16, to_bits = widen ? 32 : bits;
  if (from.bits() != bits) throw py::value_error("table must hold numbers of " + std::to_string(bits) + " bits");
  const std::vector<int64_t> shape = {arguments.count, arguments.channels};
  if (to.shape() != shape || to.bits() != to_bits) {
    throw py::value_error("output must be " + Array::Brackets(shape) + " of " + std::to_string(to_bits) + " bits");
  }
  arguments.ids = Integers("ids", ids, {arguments.count});
  arguments.table = from.data<void>();
  arguments.output = to.data<void>();
  Raise(cuda::GatherRows(arguments, StreamOf(stream)));
}

void TokenSelection(const py::object& logits, const py::object& step, const py::object& ids, const py::object& token,
                    int64_t first_id, const py::object& allowed, float penalty, const py::object& seen,
                    float temperature, float top_p, const py::object& times, const py::object& past_length,
                    uintptr_t stream) {
  const std::vector<int64_t> shape = DeviceArray("logits", logits).shape(), chosen = DeviceArray("ids", ids).shape();
  if (shape.size() != 2 || chosen.size() != 2) throw py::value_error("logits and ids must have 2 dimensions");
  cuda::TokenSelectionArguments arguments;
  arguments.batch = shape[0];
  arguments.rows = shape[1];
  arguments.steps = chosen[0];
  arguments.first_id = first_id;
  arguments.penalty = penalty;
  arguments.temperature = temperature;
  arguments.top_p = top_p;
  arguments.logits = Floats("logits", logits, shape);
  arguments.step = Integers("step", step, {shape[0]});
  arguments.ids = Integers("ids", ids, {chosen[0], shape[0]});
  arguments.token = Integers("token", token, {shape[0]});
  arguments.times = OptionalFloats("times", times, {chosen[0], shape[0], shape[1]});
  if (!past_length.is_none()) arguments.past_length = Integers("past_length", past_length, {shape[0]});
  if (!allowed.is_none()) {
    const std::vector<int64_t> words = {cuda::CeilDivide(shape[1], 32)};
    arguments.allowed = DeviceArray("allowed", allowed).Expect(words, Array::kInt, 32).data<const uint32_t>();
  }
  if (!seen.is_none()) {
    arguments.seen = DeviceArray("seen", seen).Expect(shape, Array::kUnsigned, 8).data<uint8_t>();
  }
  Raise(cuda::TokenSelection(arguments, StreamOf(stream)));
}

}  // namespace

void BindTokens(py::module_& module) {
  module.def("gather_rows", &GatherRows, py::arg("ids"), py::arg("table"), py::arg("output"),
             py::arg("storage") = "float16", py::arg("widen") = false, py::arg("stream") = 0,
             "output [S, C] = table [N, C][ids], in the table's type or widened to float32.");
  module.def("token_selection", &TokenSelection, py::arg("logits"), py::arg("step"), py::arg("ids"), py::arg("token"),
             py::arg("first_id") = 0, py::arg("allowed") = py::none(), py::arg("penalty") = 1.0f,
             py::arg("seen") = py::none(), py::arg("temperature") = 0.0f, py::arg("top_p") = 1.0f,
             py::arg("times") = py::none(), py::arg("past_length") = py::none(), py::arg("stream") = 0,
             "Writes the ids [T, B] of the steps [B], which are on the GPU. Operands as in "
             "csrc/token_selection/cuda.h; the bits of `allowed` are in int32.");
}

}  // namespace healthgpt
