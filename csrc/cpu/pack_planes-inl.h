// pack_planes: one block of up to 1,024 values. Sign and mantissa stay bytes; exponents become 3-bit codes into the block's table of
// seven, stored as bit planes, code 7 being an escape whose exponent stands in a list. Decoding a value takes a fixed number of
// operations; escapes are patched behind. Layout: fastee/reference/pack_planes.py. Floor: read 2 (4) bytes, write about 0.7 (0.85).
#pragma once
#include "cpu/bits.h"
#include "cpu/element.h"
#include "cpu/kernels.h"

namespace fastee::cpu::FASTEE_ISA {

// The seven commonest exponents among every second value, the smaller one first among equals. Every value would save another 0.1 % on
// the demo network's bf16 activations, every fourth costs 0.2 % more.
FASTEE_INLINE void choose_table(const uint8_t* e, int64_t n, uint8_t* table) {
  alignas(64) uint16_t seen[4][256] = {};  // four histograms: neighbours often hold the same exponent, and a count waits for the last one
  int64_t i = 0;
  for (; i + 6 < n; i += 8) ++seen[0][e[i]], ++seen[1][e[i + 2]], ++seen[2][e[i + 4]], ++seen[3][e[i + 6]];
  for (; i < n; i += 2) ++seen[0][e[i]];
  alignas(64) uint32_t key[256];
  for (uint32_t v = 0; v < 256; ++v) key[v] = static_cast<uint32_t>(seen[0][v] + seen[1][v] + seen[2][v] + seen[3][v]) << 8 | (255 - v);
  for (int t = 0; t < 7; ++t) {
    uint32_t best = 0;
    for (int v = 0; v < 256; ++v) best = key[v] > best ? key[v] : best;
    table[t] = static_cast<uint8_t>(255 - (best & 255));
    key[table[t]] = 0;
  }
}

// Values to exponents, bytes beside them and, in fp32, the low halves.
FASTEE_INLINE void split_values(const uint8_t* values, int element, int64_t n, uint8_t* e, uint8_t* low, uint8_t* halves) {
  const uint16_t* u = reinterpret_cast<const uint16_t*>(values);
  if (element == kF16) {
    for (int64_t i = 0; i < n; ++i) e[i] = (u[i] >> 10) & 31;
    for (int64_t i = 0; i < n; ++i) low[i] = static_cast<uint8_t>(u[i]);
    return;
  }
  uint16_t upper[kPlaneBlock];
  if (element == kF32) {
    const uint32_t* w = reinterpret_cast<const uint32_t*>(values);
    for (int64_t i = 0; i < n; ++i) {
      const uint16_t half = static_cast<uint16_t>(w[i]);
      __builtin_memcpy(halves + 2 * i, &half, 2);
    }
    for (int64_t i = 0; i < n; ++i) upper[i] = static_cast<uint16_t>(w[i] >> 16);
    u = upper;
  }
  for (int64_t i = 0; i < n; ++i) e[i] = static_cast<uint8_t>(u[i] >> 7);
  for (int64_t i = 0; i < n; ++i) low[i] = static_cast<uint8_t>((u[i] & 0x7f) | (u[i] >> 8 & 0x80));
}

static int64_t pack_planes(const void* data, int element, int64_t n, uint8_t* out) {
  const uint8_t* values = static_cast<const uint8_t*>(data);
  const int64_t width = element == kF32 ? 4 : 2, words = (n + 63) / 64, raw = n * width;
  alignas(64) uint8_t e[kPlaneBlock], low[kPlaneBlock], code[kPlaneBlock], halves[2 * kPlaneBlock];
  uint8_t table[8] = {};
  uint64_t plane[6][16];
  split_values(values, element, n, e, low, halves);
  choose_table(e, n, table);
  for (int64_t i = n; i < 64 * words; ++i) e[i] = table[0];
  int64_t escapes = 0;
  for (int64_t j = 0; j < words; ++j) {
    uint8_t* c = code + 64 * j;
    const uint8_t* from = e + 64 * j;
    for (int i = 0; i < 64; ++i) {
      uint8_t v = 7;
#pragma GCC unroll 7
      for (int t = 0; t < 7; ++t) v = from[i] == table[t] ? static_cast<uint8_t>(t) : v;
      c[i] = v;
    }
    uint64_t p[3];
    gather_planes(c, p);
    for (int k = 0; k < 3; ++k) plane[k][j] = p[k];
    escapes += __builtin_popcountll(p[0] & p[1] & p[2]);
  }
  const int64_t planes = element == kF16 ? 6 : 3;
  const int64_t size = 8 * words * planes + n + (element == kF32 ? 2 * n : 0) + escapes;
  const bool coded = size < raw;
  __builtin_memset(out, 0, kPlaneHead);
  uint8_t* to = out + kPlaneHead;
  if (!coded) {
    __builtin_memcpy(to, values, static_cast<unsigned long>(raw));
    to += raw;
  } else {
    __builtin_memcpy(out, table, 7);
    out[7] = 1;
    out[8] = static_cast<uint8_t>(escapes), out[9] = static_cast<uint8_t>(escapes >> 8);
    if (element == kF16) {
      const uint16_t* u = reinterpret_cast<const uint16_t*>(values);
      alignas(64) uint8_t top[kPlaneBlock];
      for (int64_t i = 0; i < n; ++i) top[i] = static_cast<uint8_t>((u[i] >> 8 & 3) | (u[i] >> 13 & 4));
      for (int64_t i = n; i < 64 * words; ++i) top[i] = 0;
      for (int64_t j = 0; j < words; ++j) {
        uint64_t p[3];
        gather_planes(top + 64 * j, p);
        for (int k = 0; k < 3; ++k) plane[3 + k][j] = p[k];
      }
    }
    for (int64_t k = 0; k < planes; ++k, to += 8 * words) __builtin_memcpy(to, plane[k], static_cast<unsigned long>(8 * words));
    __builtin_memcpy(to, low, static_cast<unsigned long>(n));
    to += n;
    if (element == kF32) __builtin_memcpy(to, halves, static_cast<unsigned long>(2 * n)), to += 2 * n;
    for (int64_t j = 0; j < words; ++j)
      for (uint64_t m = plane[0][j] & plane[1][j] & plane[2][j]; m; m &= m - 1) *to++ = e[64 * j + __builtin_ctzll(m)];
  }
  while ((to - out) & 3) *to++ = 0;
  return to - out;
}

static bool unpack_planes(const uint8_t* in, int64_t bytes, int element, int64_t n, void* data) {
  const int64_t width = element == kF32 ? 4 : 2, words = (n + 63) / 64, raw = n * width;
  if (bytes < kPlaneHead) return false;
  const uint8_t* from = in + kPlaneHead;
  if (in[7] == 0) {
    if (bytes != plane_block_bound(n, width)) return false;
    __builtin_memcpy(data, from, static_cast<unsigned long>(raw));
    return true;
  }
  const int64_t escapes = in[8] | in[9] << 8, planes = element == kF16 ? 6 : 3;
  if (in[7] != 1 || bytes != (kPlaneHead + 8 * words * planes + n + (element == kF32 ? 2 * n : 0) + escapes + 3) / 4 * 4) return false;
  uint64_t plane[6][16];
  for (int64_t k = 0; k < planes; ++k, from += 8 * words) __builtin_memcpy(plane[k], from, static_cast<unsigned long>(8 * words));
  const uint8_t *low = from, *halves = from + n, *list = from + n + (element == kF32 ? 2 * n : 0);
  alignas(64) uint8_t e[kPlaneBlock], top[kPlaneBlock];
  uint8_t table[8], identity[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  __builtin_memcpy(table, in, 7);
  table[7] = 0;
  int64_t found = 0;
  for (int64_t j = 0; j < words; ++j) {
    const uint64_t p[3] = {plane[0][j], plane[1][j], plane[2][j]};
    found += __builtin_popcountll(p[0] & p[1] & p[2]);
    lookup_planes(p, table, e + 64 * j);
  }
  if (found != escapes) return false;
  for (int64_t j = 0; j < words; ++j)
    for (uint64_t m = plane[0][j] & plane[1][j] & plane[2][j]; m; m &= m - 1) e[64 * j + __builtin_ctzll(m)] = *list++;
  uint8_t* out = static_cast<uint8_t*>(data);
  if (element == kF16) {
    for (int64_t j = 0; j < words; ++j) {
      const uint64_t p[3] = {plane[3][j], plane[4][j], plane[5][j]};
      lookup_planes(p, identity, top + 64 * j);
    }
    for (int64_t i = 0; i < n; ++i) {
      const uint16_t v = static_cast<uint16_t>(low[i] | (top[i] & 3) << 8 | (e[i] & 31) << 10 | (top[i] & 4) << 13);
      __builtin_memcpy(out + 2 * i, &v, 2);
    }
  } else if (element == kF32) {
    for (int64_t i = 0; i < n; ++i) {
      uint16_t half;
      __builtin_memcpy(&half, halves + 2 * i, 2);
      const uint32_t v = static_cast<uint32_t>(half) | static_cast<uint32_t>((low[i] & 0x7f) | e[i] << 7 | (low[i] & 0x80) << 8) << 16;
      __builtin_memcpy(out + 4 * i, &v, 4);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const uint16_t v = static_cast<uint16_t>((low[i] & 0x7f) | e[i] << 7 | (low[i] & 0x80) << 8);
      __builtin_memcpy(out + 2 * i, &v, 2);
    }
  }
  return true;
}
}  // namespace fastee::cpu::FASTEE_ISA
