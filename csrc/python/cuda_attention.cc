// Attention on a GPU as a Python function, which checks shapes and calls the launcher.
#include <pybind11/stl.h>

#include "cached_attention/pass.h"
#include "cached_attention/prefill.h"
#include "python/cuda.h"

namespace py = pybind11;

namespace healthgpt {
namespace {

int64_t AttentionWorkspaceBytes(int64_t batch, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_size,
                                int64_t capacity) {
  cuda::CachedAttentionArguments arguments;
  arguments.batch = batch;
  arguments.tokens = tokens;
  arguments.heads = heads;
  arguments.kv_heads = kv_heads;
  arguments.head_size = head_size;
  arguments.capacity = capacity;
  return cuda::CachedAttentionWorkspaceBytes(arguments);
}

// The operands that all launchers have.
cuda::CachedAttentionArguments Operands(const py::object& packed, const py::object& cosine, const py::object& sine,
                                        const py::object& past_length, const py::object& keys, const py::object& values,
                                        const py::object& output, const std::string& storage, int64_t window,
                                        const py::object& key_scales, const py::object& value_scales) {
  const std::vector<int64_t> cache = DeviceArray("keys", keys).shape(), given = DeviceArray("packed", packed).shape();
  if (given.size() != 3 || cache.size() != 4) throw py::value_error("packed must have 3 dimensions, the caches 4");
  cuda::CachedAttentionArguments arguments;
  arguments.batch = given[0];
  arguments.tokens = given[1];
  arguments.kv_heads = cache[1];
  arguments.capacity = cache[2];
  arguments.head_size = cache[3];
  arguments.window = window;
  arguments.cache = StorageOf(storage);
  const int64_t size = arguments.head_size, kv_size = arguments.kv_heads * size, query_size = given[2] - 2 * kv_size;
  if (size < 1 || query_size < size || query_size % size != 0) {
    throw py::value_error("packed must hold the heads of queries, then keys, then values");
  }
  arguments.heads = query_size / size;
  const std::vector<int64_t> cache_shape = {given[0], cache[1], cache[2], cache[3]};
  arguments.query = Floats("packed", packed, given);
  arguments.key = arguments.query + query_size;
  arguments.value = arguments.key + kv_size;
  arguments.query_stride = arguments.key_stride = arguments.value_stride = given[2];
  arguments.cosine = Floats("cosine", cosine, {given[0], given[1], size / 2});
  arguments.sine = Floats("sine", sine, {given[0], given[1], size / 2});
  arguments.past_length =
      DeviceArray("past_length", past_length).Expect({given[0]}, Array::kInt, 64).data<const int64_t>();
  const int bits = arguments.cache == cuda::Storage::kInt8 ? 8 : 16;
  for (const auto& [name, array] : {std::pair("keys", &keys), std::pair("values", &values)}) {
    const Array one = DeviceArray(name, *array);
    if (one.shape() != cache_shape || one.bits() != bits) {
      throw py::value_error(std::string(name) + " must be " + Array::Brackets(cache_shape) + " of " +
                            std::to_string(bits) + " bits, got " + Array::Brackets(one.shape()) + " of " +
                            std::to_string(one.bits()));
    }
  }
  arguments.keys = DeviceArray("keys", keys).data<void>();
  arguments.values = DeviceArray("values", values).data<void>();
  const std::vector<int64_t> rows = {given[0], cache[1], cache[2]};
  arguments.key_scales = OptionalFloats("key_scales", key_scales, rows);
  arguments.value_scales = OptionalFloats("value_scales", value_scales, rows);
  arguments.output = Floats("output", output, {given[0], given[1], query_size});
  return arguments;
}

void CachedAttention(const py::object& packed, const py::object& cosine, const py::object& sine,
                     const py::object& past_length, const py::object& keys, const py::object& values,
                     const py::object& output, const py::object& workspace, const std::string& storage, int64_t window,
                     const py::object& key_scales, const py::object& value_scales, uintptr_t stream) {
  cuda::CachedAttentionArguments arguments =
      Operands(packed, cosine, sine, past_length, keys, values, output, storage, window, key_scales, value_scales);
  const Array memory = DeviceArray("workspace", workspace);
  arguments.workspace = memory.data<void>();
  arguments.workspace_bytes = memory.bytes();
  Raise(cuda::CachedAttention(arguments, StreamOf(stream)));
}

// Defines a function of the operands alone: launch(arguments, stream).
template <class Launch>
void Define(py::module_& module, const char* name, Launch launch, const char* doc) {
  const auto call = [launch](const py::object& packed, const py::object& cosine, const py::object& sine,
                             const py::object& past_length, const py::object& keys, const py::object& values,
                             const py::object& output, const std::string& storage, int64_t window,
                             const py::object& key_scales, const py::object& value_scales, uintptr_t stream) {
    Raise(launch(
        Operands(packed, cosine, sine, past_length, keys, values, output, storage, window, key_scales, value_scales),
        StreamOf(stream)));
  };
  module.def(name, call, py::arg("packed"), py::arg("cosine"), py::arg("sine"), py::arg("past_length"), py::arg("keys"),
             py::arg("values"), py::arg("output"), py::arg("storage") = "float16", py::arg("window") = 0,
             py::arg("key_scales") = py::none(), py::arg("value_scales") = py::none(), py::arg("stream") = 0, doc);
}

}  // namespace

void BindAttention(py::module_& module) {
  module.def("cached_attention_workspace_bytes", &AttentionWorkspaceBytes, py::arg("batch"), py::arg("tokens"),
             py::arg("heads"), py::arg("kv_heads"), py::arg("head_size"), py::arg("capacity"),
             "Bytes of workspace, which must be zeros before its first use.");
  module.def("cached_attention", &CachedAttention, py::arg("packed"), py::arg("cosine"), py::arg("sine"),
             py::arg("past_length"), py::arg("keys"), py::arg("values"), py::arg("output"), py::arg("workspace"),
             py::arg("storage") = "float16", py::arg("window") = 0, py::arg("key_scales") = py::none(),
             py::arg("value_scales") = py::none(), py::arg("stream") = 0,
             "Attention [B, S, H * D] over caches [B, K, M, D]. Appends the new keys and values to the caches; int8 "
             "caches have scales [B, K, M]. packed [B, S, (H + 2 K) * D] holds queries, keys and values. Operands as "
             "in csrc/cached_attention/cuda.h.");
  Define(module, "cached_attention_prefill", &cuda::CachedAttentionPrefill,
         "cached_attention for many tokens: csrc/cached_attention/prefill.h.");
#ifndef HEALTHGPT_WITHOUT_CUBLASLT
  const auto pass = [](const cuda::CachedAttentionArguments& arguments, cuda::Stream stream) {
    return cuda::CachedAttentionPass(arguments, KeptWorkspaces(), stream);
  };
  Define(module, "cached_attention_pass", pass,
         "cached_attention for any number of tokens, with its own working memory for each stream: "
         "csrc/cached_attention/pass.h.");
#endif
}

}  // namespace healthgpt
