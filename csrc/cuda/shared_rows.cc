#include "cuda/shared_rows.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace healthgpt::cuda {
namespace {

constexpr int64_t kBytesAtOnce = 4 << 20;  // of a comparison, or of rows that are put together
constexpr int64_t kSamples = 64, kSampleBytes = 64;

struct Rows : HostRows {
  int64_t stride;

  const char* host() const { return static_cast<const char*>(data); }
  int64_t size() const { return count * bytes; }
  int64_t at_once() const { return std::clamp<int64_t>(kBytesAtOnce / bytes, 1, count); }
  // `number` rows from number `first` on, without gaps: where they are, or put together in `memory`.
  const char* At(int64_t first, int64_t number, std::vector<char>& memory) const {
    if (pieces == 1) return host() + first * bytes;
    const int64_t width = bytes / pieces;
    memory.resize(static_cast<size_t>(number * bytes));
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const char* const from = host() + (piece * count + first) * width;
      for (int64_t row = 0; row < number; ++row) {
        std::memcpy(memory.data() + row * bytes + piece * width, from + row * width, static_cast<size_t>(width));
      }
    }
    return memory.data();
  }
};

// Sizes, and a number that differs for most other rows of these sizes.
using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, uint64_t>;

Key KeyOf(const Rows& rows) {
  uint64_t number = 14695981039346656037u;  // FNV-1a, of some pieces throughout the rows
  const int64_t step = std::max(rows.size() / kSamples, kSampleBytes);
  for (int64_t from = 0; from < rows.size(); from += step) {
    for (int64_t i = from; i < std::min(from + kSampleBytes, rows.size()); ++i) {
      number = (number ^ static_cast<unsigned char>(rows.host()[i])) * 1099511628211u;
    }
  }
  return {rows.count, rows.bytes, rows.pieces, rows.stride, number};
}

void Raise(Status status) {
  if (status != nullptr) throw std::runtime_error(std::string("CUDA: ") + status);
}

// All of the rows, byte by byte: a bundle is anyone's, and must not get by with what only looks like another's weights.
bool AreEqual(const Memory& memory, const Rows& rows) {
  std::vector<char> found(static_cast<size_t>(rows.at_once() * rows.bytes)), together;
  for (int64_t row = 0; row < rows.count; row += rows.at_once()) {
    const int64_t count = std::min(rows.at_once(), rows.count - row);
    const char* const from = static_cast<const char*>(memory.data()) + row * rows.stride;
    Raise(CopyRows(found.data(), rows.bytes, from, rows.stride, rows.bytes, count));
    if (std::memcmp(found.data(), rows.At(row, count, together), static_cast<size_t>(count * rows.bytes)) != 0) {
      return false;
    }
  }
  return true;
}

void CopyAll(const Memory& memory, const Rows& rows) {
  std::vector<char> together;
  const int64_t at_once = rows.pieces == 1 ? rows.count : rows.at_once();
  for (int64_t row = 0; row < rows.count; row += at_once) {
    const int64_t count = std::min(at_once, rows.count - row);
    char* const to = static_cast<char*>(memory.data()) + row * rows.stride;
    Raise(CopyRows(to, rows.stride, rows.At(row, count, together), rows.bytes, rows.bytes, count));
  }
}

struct Kept {
  std::mutex mutex;
  std::multimap<Key, std::weak_ptr<const Memory>> memory;
};

Kept& All() {
  static auto& kept = *new Kept;  // never freed: sessions may end after static objects
  return kept;
}

}  // namespace

std::shared_ptr<const Memory> SharedRows(const HostRows& rows, int64_t stride) {
  const Rows given = {rows, stride};
  const Key key = KeyOf(given);
  Kept& kept = All();
  const std::lock_guard lock(kept.mutex);
  for (auto [at, end] = kept.memory.equal_range(key); at != end;) {
    const std::shared_ptr<const Memory> found = at->second.lock();
    if (found != nullptr && AreEqual(*found, given)) return found;
    at = found == nullptr ? kept.memory.erase(at) : std::next(at);
  }
  const auto made = std::make_shared<Memory>(given.count * given.stride);
  CopyAll(*made, given);
  kept.memory.emplace(key, made);
  return made;
}

int64_t SharedRowsBytes() {
  Kept& kept = All();
  const std::lock_guard lock(kept.mutex);
  int64_t bytes = 0;
  for (const auto& [key, memory] : kept.memory) {
    if (const auto held = memory.lock()) bytes += held->bytes();
  }
  return bytes;
}

}  // namespace healthgpt::cuda
