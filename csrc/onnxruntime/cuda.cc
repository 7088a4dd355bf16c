// The library of the kernels for ONNX Runtime's CUDA provider; built for the host's fibers, for the CPU in its place.
#include "onnxruntime/cuda.h"

namespace healthgpt {

#ifdef HEALTHGPT_CUDA_HOST
const char* Provider() { return nullptr; }
#else
const char* Provider() { return "CUDAExecutionProvider"; }
#endif

std::vector<const OrtCustomOp*> Operators() {
  return {CudaLinearOperator(), CudaHLoraLinearOperator(), CudaCachedAttentionOperator(cuda::Storage::kFloat16),
          CudaCachedAttentionOperator(cuda::Storage::kInt8)};
}

std::shared_ptr<Workspaces> Workspaces::Get() {
  static std::mutex mutex;
  static std::weak_ptr<Workspaces> kept;
  const std::lock_guard lock(mutex);
  std::shared_ptr<Workspaces> workspaces = kept.lock();
  if (workspaces == nullptr) kept = workspaces = std::make_shared<Workspaces>();
  return workspaces;
}

void* Workspaces::Reserve(cuda::Stream stream, int64_t use, int64_t bytes) {
  const std::lock_guard lock(mutex_);
  std::vector<cuda::Memory>& given = memory_[{stream, use}];
  if (given.empty() || given.back().bytes() < bytes) {
    int64_t rounded = 1 << 16;  // to powers of two: together, what was outgrown is no more than what is in use
    while (rounded < bytes) rounded *= 2;
    given.emplace_back(rounded);
  }
  return given.back().data();
}

}  // namespace healthgpt
