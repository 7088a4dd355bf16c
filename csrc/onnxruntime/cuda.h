// What the nodes on a GPU share: working memory for the launchers, and what becomes of their status.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/memory.h"
#include "onnxruntime/operator.h"

namespace healthgpt {

const OrtCustomOp* CudaLinearOperator();
const OrtCustomOp* CudaHLoraLinearOperator();
const OrtCustomOp* CudaCachedAttentionOperator(cuda::Storage cache);

inline cuda::Stream StreamOf(const Call& call) { return static_cast<cuda::Stream>(call.Stream()); }

inline void Raise(cuda::Status status) {
  if (status != nullptr) throw std::runtime_error(status[0] == '[' ? status : std::string("CUDA: ") + status);
}

// Working memory that all nodes of a kind share which follow each other in a stream. It is there for as long as a node
// holds it; no session of ours runs more than some hundred nodes, and one at a time.
class Workspaces {
 public:
  // Uses begin with different zeros: those of attention are counted from kAttention on, by how many it has.
  enum Use : int64_t { kDecode = 0, kPrefill = 1, kAttention = 2 };

  static std::shared_ptr<Workspaces> Get();

  // Zeros when they are new. What was given before stays where it is, because a captured graph may go on using it; and
  // a graph is captured from its second run on, when nothing is allocated any more.
  void* Reserve(cuda::Stream stream, int64_t use, int64_t bytes);

 private:
  std::mutex mutex_;
  std::map<std::pair<cuda::Stream, int64_t>, std::vector<cuda::Memory>> memory_;
};

}  // namespace healthgpt
