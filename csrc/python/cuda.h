// What the CUDA bindings share: the device of their arrays, and the exception of a launcher's status.
#pragma once

#include "cuda/storage.h"
#include "cuda/workspaces.h"
#include "python/array.h"

namespace healthgpt {

// The module is built for the GPU and, with arrays on the CPU, for the host's fibers (csrc/cuda/host).
#ifdef HEALTHGPT_CUDA_HOST
constexpr int32_t kDevice = Array::kCpu;
#else
constexpr int32_t kDevice = Array::kCuda;
#endif

inline Array DeviceArray(const char* name, const pybind11::handle& object) { return Array(name, object, kDevice); }

// The data of a float32 array of this shape.
inline float* Floats(const char* name, const pybind11::handle& object, const std::vector<int64_t>& shape) {
  return DeviceArray(name, object).Expect(shape, Array::kFloat, 32).data<float>();
}
inline float* OptionalFloats(const char* name, const pybind11::handle& object, const std::vector<int64_t>& shape) {
  return object.is_none() ? nullptr : Floats(name, object, shape);
}

inline cuda::Stream StreamOf(uintptr_t stream) { return reinterpret_cast<cuda::Stream>(stream); }

// ValueError for an error of a launcher's checks, RuntimeError for one of CUDA.
inline void Raise(cuda::Status status) {
  if (status == nullptr) return;
  if (status[0] == '[') throw pybind11::value_error(status);
  throw std::runtime_error(std::string("CUDA: ") + status);
}

cuda::Storage StorageOf(const std::string& name);

#ifndef HEALTHGPT_WITHOUT_CUBLASLT
// The working memory of launchers that are given none. Never freed: at the end of the process CUDA may already be gone.
inline cuda::Workspaces& KeptWorkspaces() {
  static auto& kept = *new std::shared_ptr(cuda::Workspaces::Get());
  return *kept;
}
#endif

}  // namespace healthgpt
