// healthgpt_edge._kernels: the CPU launchers as functions on NumPy arrays, which check shapes and call a launcher.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "cached_attention/cached_attention.h"
#include "convolution/convolution.h"
#include "hlora_linear/hlora_linear.h"
#include "packed_attention/packed_attention.h"
#include "python/threads.h"

namespace py = pybind11;

void BindCeilings(py::module_& module);  // ceilings.cc

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

namespace {

const std::map<std::string, healthgpt::Target> kTargets = {{"portable", healthgpt::Target::kPortable},
                                                           {"neon", healthgpt::Target::kNeon},
                                                           {"avx2", healthgpt::Target::kAvx2},
                                                           {"avx-vnni", healthgpt::Target::kAvxVnni},
                                                           {"avx512", healthgpt::Target::kAvx512}};

std::vector<std::string> Targets() {
  std::vector<std::string> names;
  for (const auto& [name, target] : kTargets) {
    if (healthgpt::IsSupported(target)) names.push_back(name);
  }
  return names;
}

std::string InstructionSet() {
  const auto best = std::find_if(kTargets.begin(), kTargets.end(),
                                 [](const auto& target) { return target.second == healthgpt::BestTarget(); });
  return best->first + (healthgpt::UsesAmx() ? " with amx" : "");
}

healthgpt::Target TargetOf(const std::optional<std::string>& name) {
  if (!name) return healthgpt::BestTarget();
  const auto found = kTargets.find(*name);
  if (found == kTargets.end() || !healthgpt::IsSupported(found->second)) {
    std::string names;
    for (const std::string& one : Targets()) names += (names.empty() ? "" : ", ") + one;
    throw py::value_error("target must be one of " + names + ", got " + *name);
  }
  return found->second;
}

// How many threads a call starts for itself, or those that it finds waiting.
using ThreadsOrCount = std::variant<size_t, healthgpt::Threads*>;

// Calls a launcher without Python's lock.
template <class Arguments>
void Run(void (*launcher)(const Arguments&, const healthgpt::Parallel&, healthgpt::Target), const Arguments& arguments,
         const std::optional<std::string>& target, const ThreadsOrCount& threads) {
  const healthgpt::Target chosen = TargetOf(target);
  const py::gil_scoped_release release;
  if (const auto* waiting = std::get_if<healthgpt::Threads*>(&threads)) {
    return launcher(arguments, (*waiting)->parallel(), chosen);
  }
  healthgpt::Threads own(std::get<size_t>(threads));
  launcher(arguments, own.parallel(), chosen);
}

std::string Text(const std::vector<int64_t>& shape) {
  std::string text;
  for (int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

void CheckShape(const char* name, const py::array& array, const std::vector<int64_t>& expected) {
  const std::vector<int64_t> found(array.shape(), array.shape() + array.ndim());
  if (found != expected) {
    throw py::value_error(std::string(name) + " must be " + Text(expected) + ", got " + Text(found));
  }
}

bool IsHalf(const py::array& array) { return array.dtype().kind() == 'f' && array.itemsize() == 2; }

// A matrix as the exporter stores it, with the arrays that own its memory.
struct StoredMatrix {
  StoredMatrix(const py::array& given, const std::optional<py::array>& scales_given, int64_t block_size,
               const std::optional<std::vector<int64_t>>& shape)
      : values(py::array::ensure(given, py::array::c_style)), scales(scales_given) {
    using healthgpt::Storage;
    const bool packed = py::isinstance<py::array_t<uint8_t>>(values);
    if (packed) {
      matrix.storage = Storage::kInt4;
    } else if (py::isinstance<py::array_t<int8_t>>(values)) {
      matrix.storage = Storage::kInt8;
    } else if (py::isinstance<py::array_t<float>>(values)) {
      matrix.storage = Storage::kFloat32;
    } else if (IsHalf(values)) {
      matrix.storage = Storage::kFloat16;
    } else if (py::isinstance<py::array_t<uint16_t>>(values)) {  // NumPy itself has no bfloat16
      matrix.storage = Storage::kBFloat16;
    } else {
      throw py::value_error(
          "values must be float32, float16, uint16 with the bits of bfloat16, int8, or uint8 with two int4 each");
    }
    if (packed != shape.has_value()) throw py::value_error("shape goes with packed int4 values, and only with them");
    const bool integer = matrix.storage == Storage::kInt4 || matrix.storage == Storage::kInt8;
    std::vector<int64_t> size = packed ? *shape : std::vector<int64_t>(values.shape(), values.shape() + values.ndim());
    const bool panels = integer && size.size() == 3 && size[2] == healthgpt::kPanel;
    if (!panels && size.size() != 2) {
      throw py::value_error("a matrix must have 2 dimensions, or 3 if it is of integers in panels of 128, got " +
                            Text(size));
    }
    int64_t numbers = 1;
    for (const int64_t length : size) {
      if (length < 1) throw py::value_error("a matrix must have numbers, got " + Text(size));
      if (__builtin_mul_overflow(numbers, length, &numbers)) {
        throw py::value_error("shape is too large: " + Text(size));
      }
    }
    matrix.channels = size[panels ? 1 : 0];
    matrix.outputs = panels ? size[0] * size[2] : size[1];
    matrix.panel = panels ? healthgpt::kPanel : 0;
    if (packed) CheckShape("values", values, {numbers / 2 + numbers % 2});
    if (integer != scales.has_value()) throw py::value_error("scales go with integers, and only with them");
    if (integer) {
      if (block_size < 4 || block_size > 256 || block_size % 4 != 0) {
        throw py::value_error("block_size must be a multiple of 4 up to 256, got " + std::to_string(block_size));
      }
      int64_t& channels = size[panels ? 1 : 0];
      channels = (channels + block_size - 1) / block_size;
      CheckShape("scales", *scales, size);
      if (panels && !py::isinstance<py::array_t<uint16_t>>(*scales)) {
        throw py::value_error("scales in panels must be uint16 with the bits of bfloat16");
      }
      scales = panels ? py::array::ensure(*scales, py::array::c_style) : Floats::ensure(*scales);
      if (!*scales) throw py::value_error("scales must be float32");
      matrix.block_size = block_size;
      matrix.scales = scales->data();
    }
    matrix.values = values.data();
  }

  void Check(const char* name, int64_t channels, int64_t outputs) const {
    if (matrix.channels != channels || matrix.outputs != outputs) {
      throw py::value_error(std::string(name) + " must be " + Text({channels, outputs}) + ", got " +
                            Text({matrix.channels, matrix.outputs}));
    }
  }

  py::array values;
  std::optional<py::array> scales;
  healthgpt::Matrix matrix;
};

Floats HLoraLinear(const Floats& x, const StoredMatrix& weight, const std::optional<Floats>& bias,
                   const StoredMatrix* adapter_in, const StoredMatrix* adapter_out, int64_t experts,
                   const std::optional<std::string>& target, const ThreadsOrCount& threads,
                   std::optional<float> epsilon, bool pair_input, const std::optional<Floats>& residual,
                   bool quick_gelu) {
  if (x.ndim() != 2) throw py::value_error("x must have 2 dimensions");
  if (epsilon.has_value() + pair_input + quick_gelu > 1) {
    throw py::value_error("epsilon, pair_input and quick_gelu exclude each other");
  }
  if ((experts > 0) != (adapter_in != nullptr) || (experts > 0) != (adapter_out != nullptr) || experts < 0) {
    throw py::value_error("adapter_in, adapter_out and experts go together");
  }
  healthgpt::HLoraLinearArguments arguments;
  arguments.rows = x.shape(0);
  arguments.experts = experts;
  arguments.x = x.data();
  arguments.weight = weight.matrix;
  const int64_t channels = weight.matrix.channels;
  CheckShape("x", x, {arguments.rows, pair_input ? 2 * channels : channels});
  arguments.normalise = epsilon.has_value();
  arguments.epsilon = epsilon.value_or(0.0f);
  arguments.pair_input = pair_input;
  arguments.quick_gelu = quick_gelu;
  if (experts > 0) {
    const int64_t rank = adapter_out->matrix.channels;
    if (rank % experts != 0) {
      throw py::value_error("rank must be a multiple of experts, got " + std::to_string(rank) + " and " +
                            std::to_string(experts));
    }
    adapter_in->Check("adapter_in", channels, rank + experts);
    adapter_out->Check("adapter_out", rank, weight.matrix.outputs);
    arguments.adapter_in = adapter_in->matrix;
    arguments.adapter_out = adapter_out->matrix;
  }
  if (bias) {
    CheckShape("bias", *bias, {weight.matrix.outputs});
    arguments.bias = bias->data();
  }
  if (residual) {
    CheckShape("residual", *residual, {arguments.rows, weight.matrix.outputs});
    arguments.residual = residual->data();
  }
  Floats y({arguments.rows, weight.matrix.outputs});
  arguments.y = y.mutable_data();
  Run(healthgpt::HLoraLinear, arguments, target, threads);
  return y;
}

using Lengths = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// Whether the kernel can write to the array in place.
bool IsCache(const py::array& array) {
  const char kind = array.dtype().kind();
  const ssize_t bytes = array.itemsize();
  const bool known = kind == 'f' ? bytes == 4 || bytes == 2 : kind == 'i' && bytes == 1;
  return known && (array.flags() & py::array::c_style) && array.writeable();
}

Floats CachedAttention(const Floats& query, const Floats& key, const Floats& value, const Floats& cosine,
                       const Floats& sine, const Lengths& past_length, const py::array& keys, const py::array& values,
                       int64_t window, const std::optional<std::string>& target, size_t threads,
                       const std::optional<py::array>& key_scales, const std::optional<py::array>& value_scales) {
  if (query.ndim() != 3 || keys.ndim() != 4) {
    throw py::value_error("query must have 3 dimensions and the caches 4");
  }
  healthgpt::CachedAttentionArguments arguments;
  arguments.batch = query.shape(0);
  arguments.tokens = query.shape(1);
  arguments.kv_heads = keys.shape(1);
  arguments.capacity = keys.shape(2);
  arguments.head_size = keys.shape(3);
  arguments.window = window;
  const int64_t size = arguments.head_size;
  if (size < 2 || size % 2 != 0) throw py::value_error("head size must be even, got " + std::to_string(size));
  arguments.heads = query.shape(2) / size;
  if (window < 0) throw py::value_error("window must be 0 or more, got " + std::to_string(window));
  if (arguments.kv_heads < 1 || arguments.heads % arguments.kv_heads != 0) {
    throw py::value_error("heads must be a multiple of kv_heads, got " + std::to_string(arguments.heads) + " and " +
                          std::to_string(arguments.kv_heads));
  }
  const int64_t batch = arguments.batch, tokens = arguments.tokens, kv_size = arguments.kv_heads * size;
  const std::vector<int64_t> cache_shape = {batch, arguments.kv_heads, arguments.capacity, size};
  CheckShape("query", query, {batch, tokens, arguments.heads * size});
  CheckShape("key", key, {batch, tokens, kv_size});
  CheckShape("value", value, {batch, tokens, kv_size});
  CheckShape("cosine", cosine, {batch, tokens, size / 2});
  CheckShape("sine", sine, {batch, tokens, size / 2});
  CheckShape("past_length", past_length, {batch});
  for (const py::array* cache : {&keys, &values}) {
    CheckShape("cache", *cache, cache_shape);
    if (!IsCache(*cache) || !cache->dtype().is(keys.dtype())) {
      throw py::value_error("caches must be writable C arrays, both float32, both float16 or both int8");
    }
  }
  for (const std::optional<py::array>* scales : {&key_scales, &value_scales}) {
    if (scales->has_value() != (keys.itemsize() == 1)) {
      throw py::value_error("key_scales and value_scales go with int8 caches, and only with them");
    }
    if (!*scales) continue;
    CheckShape("scales", **scales, {batch, arguments.kv_heads, arguments.capacity, 1});
    if (!IsCache(**scales) || (*scales)->itemsize() != 4) {
      throw py::value_error("scales must be writable C arrays of float32");
    }
  }
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t past = past_length.at(i);
    if (past < 0 || past > arguments.capacity - tokens) {
      throw py::value_error("past_length + tokens must be at most " + std::to_string(arguments.capacity) + ", got " +
                            std::to_string(past) + " + " + std::to_string(tokens));
    }
  }
  arguments.past_length = past_length.data();
  arguments.query = query.data();
  arguments.key = key.data();
  arguments.value = value.data();
  arguments.query_stride = query.shape(2);
  arguments.key_stride = arguments.value_stride = kv_size;
  arguments.cosine = cosine.data();
  arguments.sine = sine.data();
  arguments.cache = keys.itemsize() == 1   ? healthgpt::Storage::kInt8
                    : keys.itemsize() == 2 ? healthgpt::Storage::kFloat16
                                           : healthgpt::Storage::kFloat32;
  arguments.keys = const_cast<void*>(keys.data());
  arguments.values = const_cast<void*>(values.data());
  if (key_scales) {
    arguments.key_scales = static_cast<float*>(const_cast<void*>(key_scales->data()));
    arguments.value_scales = static_cast<float*>(const_cast<void*>(value_scales->data()));
  }
  Floats output({batch, tokens, arguments.heads * size});
  arguments.output = output.mutable_data();
  Run(healthgpt::CachedAttention, arguments, target, threads);
  return output;
}

Floats PackedAttention(const Floats& packed, int64_t heads, const std::optional<std::string>& target, size_t threads) {
  if (packed.ndim() != 3) throw py::value_error("packed must have 3 dimensions");
  const int64_t width = packed.shape(2) / 3;
  if (heads < 1 || width < 1 || width % heads != 0 || packed.shape(2) % 3 != 0) {
    throw py::value_error("packed must end in 3 * " + std::to_string(heads) + " * D numbers, got " +
                          std::to_string(packed.shape(2)));
  }
  healthgpt::PackedAttentionArguments arguments;
  arguments.batch = packed.shape(0);
  arguments.tokens = packed.shape(1);
  arguments.heads = heads;
  arguments.head_size = width / heads;
  arguments.packed = packed.data();
  Floats output({arguments.batch, arguments.tokens, width});
  arguments.output = output.mutable_data();
  Run(healthgpt::PackedAttention, arguments, target, threads);
  return output;
}

Floats Convolution(const Floats& x, const py::array& given, const Floats& bias,
                   const std::optional<Floats>& norm_weight, const std::optional<Floats>& norm_bias,
                   const std::optional<Floats>& residual, int64_t groups, int64_t enlarge,
                   const std::optional<std::string>& target, size_t threads) {
  if (x.ndim() != 4 || given.ndim() != 4) throw py::value_error("x and weight must have 4 dimensions");
  const bool half = IsHalf(given);
  const py::array weight = half ? py::array::ensure(given, py::array::c_style) : Floats::ensure(given);
  if (!weight) throw py::error_already_set();
  healthgpt::ConvolutionArguments arguments;
  arguments.batch = x.shape(0);
  arguments.height = x.shape(1);
  arguments.width = x.shape(2);
  arguments.channels = x.shape(3);
  arguments.outputs = weight.shape(3);
  arguments.groups = groups;
  arguments.enlarge = enlarge;
  if (enlarge != 1 && enlarge != 2) throw py::value_error("enlarge must be 1 or 2, got " + std::to_string(enlarge));
  if (groups < 0 || groups > arguments.channels || (groups > 0 && arguments.channels % groups != 0)) {
    throw py::value_error("groups must be 0 or divide " + std::to_string(arguments.channels) + " channels, got " +
                          std::to_string(groups));
  }
  if ((groups > 0) != norm_weight.has_value() || (groups > 0) != norm_bias.has_value()) {
    throw py::value_error("groups, norm_weight and norm_bias go together");
  }
  const std::vector<int64_t> shape = {arguments.batch, enlarge * arguments.height, enlarge * arguments.width,
                                      arguments.outputs};
  CheckShape("weight", weight, {3, 3, arguments.channels, arguments.outputs});
  CheckShape("bias", bias, {arguments.outputs});
  if (groups > 0) {
    CheckShape("norm_weight", *norm_weight, {arguments.channels});
    CheckShape("norm_bias", *norm_bias, {arguments.channels});
    arguments.norm_weight = norm_weight->data();
    arguments.norm_bias = norm_bias->data();
  }
  if (residual) {
    CheckShape("residual", *residual, shape);
    arguments.residual = residual->data();
  }
  arguments.x = x.data();
  arguments.weight = weight.data();
  arguments.half = half;
  arguments.bias = bias.data();
  Floats y(shape);
  arguments.y = y.mutable_data();
  Run(healthgpt::Convolution, arguments, target, threads);
  return y;
}

}  // namespace

PYBIND11_MODULE(_kernels, module) {
  module.def("targets", &Targets, "The instruction sets with kernels that this machine has.");
  module.def("instruction_set", &InstructionSet, "The one that the kernels use here by default.");
  py::class_<healthgpt::Threads>(module, "Threads",
                                 "Threads that wait for the next call, instead of some that every call starts.")
      .def(py::init<size_t>(), py::arg("count"));
  py::class_<StoredMatrix>(
      module, "Matrix", "A matrix as the exporter stores it: [channels, outputs], or [outputs / 128, channels, 128].")
      .def(py::init<const py::array&, const std::optional<py::array>&, int64_t,
                    const std::optional<std::vector<int64_t>>&>(),
           py::arg("values"), py::arg("scales") = py::none(), py::arg("block_size") = 0, py::arg("shape") = py::none());
  module.def("hlora_linear", &HLoraLinear, py::arg("x"), py::arg("weight"), py::arg("bias") = py::none(),
             py::arg("adapter_in") = py::none(), py::arg("adapter_out") = py::none(), py::arg("experts") = 0,
             py::arg("target") = py::none(), py::arg("threads").none(false) = 1, py::arg("epsilon") = py::none(),
             py::arg("pair_input") = false, py::arg("residual") = py::none(), py::arg("quick_gelu") = false,
             "y [S, O] = x W + b + gate(x R) * (x A) B + residual, float32; operands as in "
             "csrc/hlora_linear/hlora_linear.h. With epsilon x is normalised.");
  module.def(
      "cached_attention", &CachedAttention, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("cosine"),
      py::arg("sine"), py::arg("past_length"), py::arg("keys"), py::arg("values"), py::arg("window") = 0,
      py::arg("target") = py::none(), py::arg("threads") = 1, py::arg("key_scales") = py::none(),
      py::arg("value_scales") = py::none(),
      "Attention [B, S, H * D] over caches [B, K, M, D]. Appends the new keys and values to the caches. Operands "
      "as in csrc/cached_attention/cached_attention.h.");
  module.def("packed_attention", &PackedAttention, py::arg("packed"), py::arg("heads"), py::arg("target") = py::none(),
             py::arg("threads") = 1,
             "Attention [B, T, H * D] of every token to every token. Operands as in "
             "csrc/packed_attention/packed_attention.h.");
  module.def("convolution", &Convolution, py::arg("x"), py::arg("weight"), py::arg("bias"),
             py::arg("norm_weight") = py::none(), py::arg("norm_bias") = py::none(), py::arg("residual") = py::none(),
             py::arg("groups") = 0, py::arg("enlarge") = 1, py::arg("target") = py::none(), py::arg("threads") = 1,
             "A 3x3 convolution [B, H, W, O] with normalisation, swish, bias and residual. Operands as in "
             "csrc/convolution/convolution.h.");
  BindCeilings(module);
}
