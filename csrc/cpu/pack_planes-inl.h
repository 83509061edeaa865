// pack_planes: one block of up to 2,048 values. Sign and mantissa stay bytes; exponents become 3-bit codes into the block's table of
// seven, stored as bit planes, code 7 being an escape whose exponent stands in a list. Decoding a value takes a fixed number of
// operations; escapes are patched behind. Layout: fastee/reference/pack_planes.py. Floor: read 2 (4) bytes, write about 0.7 (0.85).
#pragma once
#include "cpu/bits.h"
#include "cpu/element.h"
#include "cpu/kernels.h"

namespace fastee::cpu::FASTEE_ISA {

// The seven commonest exponents among every s-th value, the smaller one first among equals. All values instead of 400 would save 0.05 %
// on the demo network's bf16 activations.
FASTEE_INLINE void choose_table(const uint8_t* e, int64_t n, uint8_t* table) {
  alignas(64) uint16_t seen[4][256] = {};  // four histograms: neighbours often hold the same exponent, and a count waits for the last one
  const int64_t s = n / 512 | 1;
  int64_t i = 0;
  for (; i + 3 * s < n; i += 4 * s) ++seen[0][e[i]], ++seen[1][e[i + s]], ++seen[2][e[i + 2 * s]], ++seen[3][e[i + 3 * s]];
  for (; i < n; i += s) ++seen[0][e[i]];
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
  const int64_t width = element == kF32 ? 4 : 2, words = (n + 63) / 64, raw = n * width, planes = element == kF16 ? 6 : 3;
  const int64_t fixed = 8 * words * planes + n + (element == kF32 ? 2 * n : 0);  // a coded block but for its escapes
  alignas(64) uint8_t e[kPlaneBlock], code[kPlaneBlock], listed[kPlaneBlock + 1];
  uint8_t *const plane = out + kPlaneHead, *const low = plane + 8 * words * planes, *const halves = low + n;
  int64_t escapes = 0, list = raw;
  bool narrow = false;
  __builtin_memset(out, 0, kPlaneHead);
  if (fixed < raw) {  // else no room for the planes, either
    split_values(values, element, n, e, low, halves);
    uint8_t table[7];
    choose_table(e, n, table);
    __builtin_memcpy(out, table, 7);
    for (int64_t i = n; i < 64 * words; ++i) e[i] = table[0];
    for (int64_t j = 0; j < words; ++j) {
      const uint8_t* from = e + 64 * j;
      for (int i = 0; i < 64; ++i) {
        uint8_t v = 7;
#pragma GCC unroll 7
        for (int t = 0; t < 7; ++t) v = from[i] == table[t] ? static_cast<uint8_t>(t) : v;
        code[i] = v;
      }
      uint64_t p[3];
      gather_planes(code, p);
      for (int k = 0; k < 3; ++k) __builtin_memcpy(plane + 8 * (words * k + j), p + k, 8);
      for (uint64_t m = p[0] & p[1] & p[2]; m; m &= m - 1) listed[escapes++] = from[__builtin_ctzll(m)];
    }
    uint8_t lowest = 255, highest = 0;
    for (int64_t i = 0; i < escapes; ++i) lowest = listed[i] < lowest ? listed[i] : lowest, highest = listed[i] > highest ? listed[i] : highest;
    if (escapes == 0) lowest = 0;
    narrow = highest - lowest < 16;
    list = narrow ? (escapes + 1) / 2 : escapes;
    if (narrow) {
      out[10] = lowest;
      listed[escapes] = lowest;
      for (int64_t i = 0; i < list; ++i) listed[i] = static_cast<uint8_t>((listed[2 * i] - lowest) | (listed[2 * i + 1] - lowest) << 4);
    }
  }
  uint8_t* to = plane;
  if (fixed + list >= raw) {
    __builtin_memset(out, 0, kPlaneHead);
    __builtin_memcpy(to, values, static_cast<unsigned long>(raw));
    to += raw;
  } else {
    out[7] = narrow ? 2 : 1;
    out[8] = static_cast<uint8_t>(escapes), out[9] = static_cast<uint8_t>(escapes >> 8);
    if (element == kF16) {
      const uint16_t* u = reinterpret_cast<const uint16_t*>(values);
      for (int64_t i = 0; i < n; ++i) code[i] = static_cast<uint8_t>((u[i] >> 8 & 3) | (u[i] >> 13 & 4));
      for (int64_t i = n; i < 64 * words; ++i) code[i] = 0;
      for (int64_t j = 0; j < words; ++j) {
        uint64_t p[3];
        gather_planes(code + 64 * j, p);
        for (int k = 0; k < 3; ++k) __builtin_memcpy(plane + 8 * (words * (3 + k) + j), p + k, 8);
      }
    }
    to += fixed;
    __builtin_memcpy(to, listed, static_cast<unsigned long>(list));
    to += list;
  }
  while ((to - out) & 3) *to++ = 0;
  return to - out;
}

static bool unpack_planes(const uint8_t* in, int64_t bytes, int element, int64_t n, void* data) {
  const int64_t width = element == kF32 ? 4 : 2, words = (n + 63) / 64, raw = n * width, planes = element == kF16 ? 6 : 3;
  if (bytes < kPlaneHead) return false;
  const uint8_t* plane = in + kPlaneHead;
  if (in[7] == 0) {
    if (bytes != plane_block_bound(n, width)) return false;
    __builtin_memcpy(data, plane, static_cast<unsigned long>(raw));
    return true;
  }
  const bool narrow = in[7] == 2;
  const int64_t escapes = in[8] | in[9] << 8, fixed = 8 * words * planes + n + (element == kF32 ? 2 * n : 0);
  if (in[7] > 2 || bytes != (kPlaneHead + fixed + (narrow ? (escapes + 1) / 2 : escapes) + 3) / 4 * 4) return false;
  const uint8_t *low = plane + 8 * words * planes, *halves = low + n, *list = plane + fixed;
  alignas(64) uint8_t e[kPlaneBlock], top[kPlaneBlock];
  uint8_t table[8], identity[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  __builtin_memcpy(table, in, 7);
  table[7] = 0;
  int64_t found = 0;
  for (int64_t j = 0; j < words; ++j) {
    uint64_t p[3];
    for (int k = 0; k < 3; ++k) __builtin_memcpy(p + k, plane + 8 * (words * k + j), 8);
    lookup_planes(p, table, e + 64 * j);
    const uint64_t others = p[0] & p[1] & p[2];
    const int64_t here = __builtin_popcountll(others);
    if (found + here > escapes) return false;
    for (uint64_t m = others; m; m &= m - 1, ++found)
      e[64 * j + __builtin_ctzll(m)] = narrow ? static_cast<uint8_t>(in[10] + (list[found / 2] >> (4 * (found & 1)) & 15)) : list[found];
  }
  if (found != escapes) return false;
  uint8_t* out = static_cast<uint8_t*>(data);
  if (element == kF16) {
    for (int64_t j = 0; j < words; ++j) {
      uint64_t p[3];
      for (int k = 0; k < 3; ++k) __builtin_memcpy(p + k, plane + 8 * (words * (3 + k) + j), 8);
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
