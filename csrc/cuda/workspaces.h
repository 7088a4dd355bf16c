// Working memory for launchers that the nodes of a graph call: nodes own no memory themselves.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda/memory.h"

namespace healthgpt::cuda {

// All nodes of one use in one stream share a piece of memory: a session runs some hundred nodes at most, one at a time.
// The memory lives as long as any node holds the Workspaces.
class Workspaces {
 public:
  // Each use has a piece of its own, because each keeps a different number of zeroed counters at the start. Attention
  // adds its number of counters to kAttention, group norm subtracts its own from kGroupNorm.
  enum Use : int64_t { kGroupNorm = -1, kDecode = 0, kPrefill = 1, kAttention = 2 };

  static std::shared_ptr<Workspaces> Get();

  // At least `bytes` bytes, which were zeros when first handed out. When a larger piece is needed the old one stays
  // valid, because a captured graph may still use it. Capturing starts with a graph's second run, when everything is
  // allocated. Throws like Memory.
  void* Reserve(Stream stream, int64_t use, int64_t bytes);

 private:
  std::mutex mutex_;
  std::map<std::pair<Stream, int64_t>, std::vector<Memory>> memory_;
};

}  // namespace healthgpt::cuda
