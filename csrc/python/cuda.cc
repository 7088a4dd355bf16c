// healthgpt_edge._cuda: the CUDA launchers as Python functions on arrays on the GPU. The host build is _cuda_host,
// which takes NumPy arrays and can also plant faults for tests.
#include "python/cuda.h"

#include <pybind11/stl.h>

#include <map>

#ifdef HEALTHGPT_CUDA_HOST
#include "cuda/host/execution.h"
#endif

namespace py = pybind11;

namespace healthgpt {

cuda::Storage StorageOf(const std::string& name) {
  static const std::map<std::string, cuda::Storage> kStorages = {{"float32", cuda::Storage::kFloat32},
                                                                 {"float16", cuda::Storage::kFloat16},
                                                                 {"bfloat16", cuda::Storage::kBFloat16},
                                                                 {"int8", cuda::Storage::kInt8},
                                                                 {"int4", cuda::Storage::kInt4}};
  const auto found = kStorages.find(name);
  if (found == kStorages.end()) {
    throw py::value_error("storage must be float32, float16, bfloat16, int8 or int4, got " + name);
  }
  return found->second;
}

void BindLinear(py::module_& module);     // cuda_linear.cc
void BindAttention(py::module_& module);  // cuda_attention.cc
void BindTokens(py::module_& module);     // cuda_tokens.cc
void BindImages(py::module_& module);     // cuda_images.cc

#ifdef HEALTHGPT_CUDA_HOST
namespace {

void SetSchedule(const std::string& order, uint32_t seed) {
  using cuda::host::Order;
  static const std::map<std::string, Order> kOrders = {
      {"forward", Order::kForward}, {"reverse", Order::kReverse}, {"shuffled", Order::kShuffled}};
  const auto found = kOrders.find(order);
  if (found == kOrders.end()) throw py::value_error("order must be forward, reverse or shuffled, got " + order);
  cuda::host::SetSchedule({found->second, seed});
}

void Mutate(const std::string& drop_barrier, int drop_block, int shift_threads) {
  cuda::host::SetMutation({drop_barrier, drop_block, shift_threads});
}

void BindHost(py::module_& module) {
  module.def("schedule", &SetSchedule, py::arg("order"), py::arg("seed") = 0, "Who goes first between barriers.");
  module.def("mutate", &Mutate, py::arg("drop_barrier") = "", py::arg("drop_block") = -1, py::arg("shift_threads") = 0,
             "Plants faults in every launch from now on; without arguments, none.");
  module.def("barriers_met", &cuda::host::BarriersMet, "The barriers met since last asked, \"file:line\".");
}

}  // namespace
#endif

}  // namespace healthgpt

#ifdef HEALTHGPT_CUDA_HOST
PYBIND11_MODULE(_cuda_host, module) {
  healthgpt::BindHost(module);
#else
PYBIND11_MODULE(_cuda, module) {
#endif
  healthgpt::BindLinear(module);
  healthgpt::BindAttention(module);
  healthgpt::BindTokens(module);
  healthgpt::BindImages(module);
}
