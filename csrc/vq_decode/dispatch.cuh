// From the storage type of images to the kernel for it.
#pragma once

#include "cuda/numbers.cuh"
#include "cuda/storage.h"

namespace healthgpt::cuda {

// Returns function(Number()) for the number type of `storage`, or an error if images cannot have this type.
template <class Function>
Status ForImages(Storage storage, const Function& function) {
  switch (storage) {
    case Storage::kFloat32:
      return function(float());
    case Storage::kFloat16:
      return function(Half());
    case Storage::kBFloat16:
      return function(BFloat16());
    default:
      return "[vq_decode] images must be float32, float16 or bfloat16";
  }
}

}  // namespace healthgpt::cuda
