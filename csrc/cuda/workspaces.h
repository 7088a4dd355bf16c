// Working memory for launchers that are called by graphs' nodes, which have none of their own to give.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda/memory.h"

namespace healthgpt::cuda {

// Working memory that all nodes of a kind share which follow each other in a stream. It is there for as long as a node
// holds it; no session of ours runs more than some hundred nodes, and one at a time.
class Workspaces {
 public:
  // Uses begin with different zeros: those of attention are counted from kAttention on, by how many it has.
  enum Use : int64_t { kDecode = 0, kPrefill = 1, kAttention = 2 };

  static std::shared_ptr<Workspaces> Get();

  // Zeros when they are new. What was given before stays where it is, because a captured graph may go on using it; and
  // a graph is captured from its second run on, when nothing is allocated any more. Throws as Memory does.
  void* Reserve(Stream stream, int64_t use, int64_t bytes);

 private:
  std::mutex mutex_;
  std::map<std::pair<Stream, int64_t>, std::vector<Memory>> memory_;
};

}  // namespace healthgpt::cuda
