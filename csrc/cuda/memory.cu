#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "cuda/memory.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

namespace healthgpt::cuda {

#ifdef __CUDACC__

namespace {

Status Text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

Memory::Memory(int64_t bytes) : bytes_(bytes) {
  const auto size = static_cast<size_t>(bytes);
  void* made = nullptr;
  Status wrong = Text(cudaMalloc(&made, size));
  data_.reset(made);  // freed if one of the next calls fails
  if (wrong == nullptr) wrong = Text(cudaMemset(made, 0, size));
  if (wrong == nullptr) wrong = Text(cudaDeviceSynchronize());  // other streams do not wait for the default stream
  if (wrong != nullptr) throw std::runtime_error("CUDA: " + std::to_string(bytes) + " bytes: " + wrong);
}

void Memory::Free::operator()(void* data) const { cudaFree(data); }

Status CopyRows(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t bytes, int64_t rows) {
  const auto width = static_cast<size_t>(bytes), height = static_cast<size_t>(rows);
  // A pitch has a limit of 2 GiB, so what has no gaps is no rectangle.
  const bool has_gaps = to_stride != bytes || from_stride != bytes;
  const Status wrong = Text(has_gaps ? cudaMemcpy2D(to, static_cast<size_t>(to_stride), from,
                                                    static_cast<size_t>(from_stride), width, height, cudaMemcpyDefault)
                                     : cudaMemcpy(to, from, width * height, cudaMemcpyDefault));
  return wrong != nullptr ? wrong : Text(cudaDeviceSynchronize());
}

Status Copy(void* to, const void* from, int64_t bytes, Stream stream) {
  return Text(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream));
}

#else

namespace {

constexpr std::align_val_t kAlignment{256};  // the same as cudaMalloc's

}  // namespace

Memory::Memory(int64_t bytes) : data_(::operator new(static_cast<size_t>(bytes), kAlignment)), bytes_(bytes) {
  std::memset(data_.get(), 0, static_cast<size_t>(bytes));
}

void Memory::Free::operator()(void* data) const { ::operator delete(data, kAlignment); }

Status CopyRows(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t bytes, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    Copy(static_cast<char*>(to) + row * to_stride, static_cast<const char*>(from) + row * from_stride, bytes, nullptr);
  }
  return nullptr;
}

Status Copy(void* to, const void* from, int64_t bytes, Stream) {
  std::memcpy(to, from, static_cast<size_t>(bytes));
  return nullptr;
}

#endif

}  // namespace healthgpt::cuda
