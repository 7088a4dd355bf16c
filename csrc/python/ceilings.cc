// healthgpt_edge._kernels: the machine's measured limits (ceilings/ceilings.h) as Python functions.
#include "ceilings/ceilings.h"

#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {

constexpr int kMostThreads = 1024;
constexpr int64_t kMostMebibytes = 1 << 20;

void CheckRange(const char* name, int64_t value, int64_t most) {
  if (value < 1 || value > most) {
    throw py::value_error("[ceilings] " + std::string(name) + " must be between 1 and " + std::to_string(most) +
                          ", got " + std::to_string(value));
  }
}

double ReadBandwidth(int64_t threads, int64_t mebibytes) {
  CheckRange("threads", threads, kMostThreads);
  CheckRange("mebibytes", mebibytes, kMostMebibytes);
  const py::gil_scoped_release release;
  return healthgpt::ReadBandwidth(static_cast<int>(threads), mebibytes << 20);
}

template <double (*measure)(int)>
double Rate(int64_t threads) {
  CheckRange("threads", threads, kMostThreads);
  const py::gil_scoped_release release;
  return measure(static_cast<int>(threads));
}

}  // namespace

void BindCeilings(py::module_& module) {
  module.def("read_bandwidth", &ReadBandwidth, py::arg("threads"), py::arg("mebibytes") = 512,
             "Bytes per second that this many threads read from a buffer of this size.");
  module.def("int8_rate", &Rate<healthgpt::Int8Rate>, py::arg("threads"),
             "Operations per second of the kernels' products of bytes with 4-bit weights on this many threads.");
  module.def("float32_rate", &Rate<healthgpt::Float32Rate>, py::arg("threads"),
             "float32 operations per second of multiply-adds on this many threads.");
}
