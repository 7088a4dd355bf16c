// What an executor asks of a GPU's memory between passes, beside the nodes. It knows the addresses of its caches, so it
// needs no array of any framework: it calls this library, which is open anyway, through ctypes.
#include "cuda/memory.h"

#include "cuda/shared_rows.h"

#define HEALTHGPT_EXPORTED extern "C" __attribute__((visibility("default")))

// As cuda::CopyRows: waits for the end of the copy; null, or what CUDA says. The caches must not be in use: ONNX
// Runtime waits for its stream at the end of a run, unless it is told not to.
HEALTHGPT_EXPORTED const char* HealthGptCopyRows(void* to, int64_t to_stride, const void* from, int64_t from_stride,
                                                 int64_t bytes, int64_t rows) {
  return healthgpt::cuda::CopyRows(to, to_stride, from, from_stride, bytes, rows);
}

// The bytes of all matrices that sessions of this process hold on the GPU; those of equal matrices once.
HEALTHGPT_EXPORTED int64_t HealthGptMatrixBytes() { return healthgpt::cuda::SharedRowsBytes(); }
