#include "cuda/workspaces.h"

namespace healthgpt::cuda {

std::shared_ptr<Workspaces> Workspaces::Get() {
  static std::mutex mutex;
  static std::weak_ptr<Workspaces> kept;
  const std::lock_guard lock(mutex);
  std::shared_ptr<Workspaces> workspaces = kept.lock();
  if (workspaces == nullptr) kept = workspaces = std::make_shared<Workspaces>();
  return workspaces;
}

void* Workspaces::Reserve(Stream stream, int64_t use, int64_t bytes) {
  const std::lock_guard lock(mutex_);
  std::vector<Memory>& given = memory_[{stream, use}];
  if (given.empty() || given.back().bytes() < bytes) {
    int64_t rounded = 1 << 16;  // doubled, so all the outgrown pieces together are no larger than the current one
    while (rounded < bytes) rounded *= 2;
    given.emplace_back(rounded);
  }
  return given.back().data();
}

}  // namespace healthgpt::cuda
