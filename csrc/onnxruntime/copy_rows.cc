// HealthGptCopyRows: what the executor asks of a GPU between passes, beside the nodes. It knows the addresses of the
// caches, so it needs no array of any framework: it calls this library, which is open anyway, through ctypes.
#include "cuda/memory.h"

// As cuda::CopyRows: waits for the end of the copy; null, or what CUDA says. The caches must not be in use: ONNX
// Runtime waits for its stream at the end of a run, unless it is told not to.
extern "C" __attribute__((visibility("default"))) const char* HealthGptCopyRows(void* to, int64_t to_stride,
                                                                                const void* from, int64_t from_stride,
                                                                                int64_t bytes, int64_t rows) {
  return healthgpt::cuda::CopyRows(to, to_stride, from, from_stride, bytes, rows);
}
