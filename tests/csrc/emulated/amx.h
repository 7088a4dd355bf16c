// AMX for processors without it, for tests: tiles in memory, of the shapes that were configured. Whatever would be a
// fault on a processor ends the program.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __AMX_INT8__ 1
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbsud

namespace healthgpt {
namespace {

struct EmulatedTiles {
  uint8_t shapes[64];  // as _tile_loadconfig takes them; all zero: tiles cannot be used
  uint8_t at[8][16][64];

  int Rows(int tile) const { return shapes[48 + Configured(tile)]; }
  int Bytes(int tile) const { return shapes[16 + 2 * Configured(tile)] + 256 * shapes[17 + 2 * tile]; }
  int Configured(int tile) const {
    if (shapes[0] != 1 || tile > 7 || shapes[48 + tile] == 0 || shapes[16 + 2 * tile] == 0) std::abort();
    return tile;
  }
};
thread_local EmulatedTiles tiles;

// All of these are found before the compiler's own, which are in no namespace.

void _tile_loadconfig(const void* shapes) {
  std::memcpy(tiles.shapes, shapes, 64);
  for (int i = 1; i < 64; ++i) {
    const bool reserved = i < 16 || (i >= 32 && i < 48) || i >= 56;
    if (reserved && tiles.shapes[i] != 0) std::abort();
  }
  for (int tile = 0; tile < 8; ++tile) {
    if (tiles.shapes[48 + tile] > 16 || tiles.shapes[16 + 2 * tile] > 64 || tiles.shapes[17 + 2 * tile] != 0) {
      std::abort();
    }
  }
  std::memset(tiles.at, 0, sizeof(tiles.at));
}
void _tile_release() { std::memset(&tiles, 0, sizeof(tiles)); }
void _tile_zero(int tile) { std::memset(tiles.at[tiles.Configured(tile)], 0, sizeof(tiles.at[tile])); }
void _tile_loadd(int tile, const void* from, int64_t stride) {
  std::memset(tiles.at[tile], 0, sizeof(tiles.at[tile]));
  for (int row = 0; row < tiles.Rows(tile); ++row) {
    std::memcpy(tiles.at[tile][row], static_cast<const uint8_t*>(from) + row * stride,
                static_cast<size_t>(tiles.Bytes(tile)));
  }
}
void _tile_stored(int tile, void* to, int64_t stride) {
  for (int row = 0; row < tiles.Rows(tile); ++row) {
    std::memcpy(static_cast<uint8_t*>(to) + row * stride, tiles.at[tile][row], static_cast<size_t>(tiles.Bytes(tile)));
  }
}
// Signed bytes times unsigned ones.
void _tile_dpbsud(int sums, int left, int right) {
  if (tiles.Rows(sums) != tiles.Rows(left) || tiles.Bytes(sums) != tiles.Bytes(right) ||
      tiles.Bytes(left) != 4 * tiles.Rows(right)) {
    std::abort();
  }
  for (int row = 0; row < tiles.Rows(sums); ++row) {
    for (int column = 0; column < tiles.Bytes(sums) / 4; ++column) {
      int32_t sum;
      std::memcpy(&sum, &tiles.at[sums][row][4 * column], 4);
      for (int i = 0; i < tiles.Bytes(left); ++i) {
        sum += static_cast<int8_t>(tiles.at[left][row][i]) * tiles.at[right][i / 4][4 * column + i % 4];
      }
      std::memcpy(&tiles.at[sums][row][4 * column], &sum, 4);
    }
  }
}

}  // namespace
}  // namespace healthgpt
