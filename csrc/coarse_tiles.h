// Rows and codes in bfloat16, for topk_coarse.cpp, where a CPU has tiles (AMX): one instruction adds the products of 32
// numbers of 16 codes and of 16 rows to all of their 16 x 16 sums. A unit is a pair of numbers.
//
//                         units of 16 rows
//                        +-----------------+
//     units of    +---+  |                 |
//     16 codes    |   |  |      sums       |       four such registers of sums, for 32 codes and 32 rows
//                 +---+  +-----------------+
#pragma once
#include "topk_cpu.h"

#if defined(__AMX_BF16__) && defined(__AVX512DQ__) && defined(__linux__)
#define MINICODE_TILES
#include <sys/syscall.h>
#include <unistd.h>

namespace minicode {
struct Tiles {
  using Sums = vf[32][NV];
  static constexpr const char* path = "bfloat16 tiles (AMX)";
  static constexpr int in_unit = 2, depth_of_tile = 32, codes_of_tile = 32;

  static bool ready() {  // Linux wants to be asked for the registers (18), by ARCH_REQ_XCOMP_PERM, once a process
    static const bool ready = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return ready;
  }

  // To the nearest, of two the even one; denormals to zero, as the tiles take them.
  static float round(const float* v, int64_t depth, bool, int32_t* units, float* rounded) {
    for (int64_t p = 0; p < depth; p++) {
      uint32_t u = std::bit_cast<uint32_t>(v[p]);
      u = (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000;
      u = (u & 0x7f800000) == 0 ? 0 : u;
      ((uint16_t*)units)[p] = u >> 16;
      rounded[p] = std::bit_cast<float>(u);
    }
    return 1;
  }

  static int64_t room(int64_t n_codes, int64_t n_units) { return n_codes * n_units; }
  static void put_code(int64_t code, const int32_t* units, int64_t n_units, int32_t* packed) {  // [C / 16][units / 16][16][16]
    for (int64_t p = 0; p < n_units; p += 16)
      std::memcpy(packed + (code / 16 * n_units + p) * 16 + code % 16 * 16, units + p, 64);
  }

  static void begin() {
    alignas(64) uint8_t config[64] = {1};
    for (int i = 0; i < 8; i++) config[16 + 2 * i] = 64, config[48 + i] = 16;  // 16 rows of 64 bytes in each tile
    _tile_loadconfig(config);
  }
  static void end() { _tile_release(); }

  static void multiply(const int32_t* rows, const int32_t* codes, int64_t n_units, Sums& sums) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t p = 0; p < n_units; p += 16) {
      _tile_loadd(4, codes + p * 16, 64); _tile_loadd(5, codes + (n_units + p) * 16, 64);
      _tile_loadd(6, rows + p * 32, 128); _tile_loadd(7, rows + p * 32 + 16, 128);
      _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, &sums[0][0], 128); _tile_stored(1, &sums[0][1], 128);
    _tile_stored(2, &sums[16][0], 128); _tile_stored(3, &sums[16][1], 128);
  }
};
}  // namespace minicode
#endif
