// The tiles of a CPU with AMX (see csrc/coarse_tiles.h) on one without: included before anything else, with -mamx-bf16.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <bit>
#include <cstdint>
#include <cstring>

namespace amx {
inline thread_local unsigned char tiles[8][16][64];

inline void load(int tile, const void* from, long stride) {
  for (int i = 0; i < 16; i++) std::memcpy(tiles[tile][i], (const char*)from + i * stride, 64);
}
inline void store(int tile, void* to, long stride) {
  for (int i = 0; i < 16; i++) std::memcpy((char*)to + i * stride, tiles[tile][i], 64);
}
inline float half(const unsigned char* at) {
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return std::bit_cast<float>(uint32_t(bits) << 16);
}
inline void add_products(int sums, int a, int b) {  // of 16 rows of 16 pairs, and 16 pairs of 16 columns
  for (int row = 0; row < 16; row++)
    for (int column = 0; column < 16; column++) {
      float sum;
      std::memcpy(&sum, &tiles[sums][row][column * 4], 4);
      for (int pair = 0; pair < 16; pair++)
        for (int i = 0; i < 4; i += 2) sum += half(&tiles[a][row][pair * 4 + i]) * half(&tiles[b][pair][column * 4 + i]);
      std::memcpy(&tiles[sums][row][column * 4], &sum, 4);
    }
}
}  // namespace amx

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) (void)(config)
#define _tile_release() (void)0
#define _tile_zero(tile) std::memset(amx::tiles[tile], 0, 1024)
#define _tile_loadd(tile, from, stride) amx::load(tile, from, stride)
#define _tile_stored(tile, to, stride) amx::store(tile, to, stride)
#define _tile_dpbf16ps(sums, a, b) amx::add_products(sums, a, b)
#define syscall(...) 0  // the system grants the registers
