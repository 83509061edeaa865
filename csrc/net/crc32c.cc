#include "net/crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace fastee::net {
namespace {

constexpr uint32_t kPoly = 0x82f63b78;  // reflected: bit 31 is x^0

constexpr std::array<uint32_t, 256> byte_table() {
  std::array<uint32_t, 256> t{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t c = i;
    for (int k = 0; k < 8; ++k) c = c & 1 ? c >> 1 ^ kPoly : c >> 1;
    t[i] = c;
  }
  return t;
}
constexpr auto kBytes = byte_table();

// a * b modulo the polynomial.
constexpr uint32_t multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
    if (a & bit) product ^= b;
    b = b & 1 ? b >> 1 ^ kPoly : b >> 1;
  }
  return product;
}

constexpr std::array<uint32_t, 64> squares() {  // x^(8 * 2^k): what 2^k zero bytes do
  std::array<uint32_t, 64> t{};
  t[0] = 1u << 23;
  for (size_t k = 1; k < t.size(); ++k) t[k] = multiply(t[k - 1], t[k - 1]);
  return t;
}
constexpr auto kSquares = squares();

uint32_t shift_by(uint64_t zero_bytes) {
  uint32_t p = 1u << 31;
  for (size_t k = 0; zero_bytes; ++k, zero_bytes >>= 1)
    if (zero_bytes & 1) p = multiply(kSquares[k], p);
  return p;
}

uint32_t by_table(uint32_t c, const uint8_t* p, size_t n) {
  for (; n; --n) c = kBytes[(c ^ *p++) & 255] ^ c >> 8;
  return c;
}

#if defined(__x86_64__) || (defined(__aarch64__) && defined(__linux__))
#if defined(__x86_64__)
#define FASTEE_CRC_TARGET __attribute__((target("sse4.2")))
bool has_instruction() { return __builtin_cpu_supports("sse4.2"); }
FASTEE_CRC_TARGET inline uint64_t step8(uint64_t c, const uint8_t* p) {
  uint64_t word;
  std::memcpy(&word, p, 8);
  return _mm_crc32_u64(c, word);
}
FASTEE_CRC_TARGET inline uint64_t step1(uint64_t c, uint8_t b) { return _mm_crc32_u8(static_cast<uint32_t>(c), b); }
#else
#define FASTEE_CRC_TARGET
bool has_instruction() { return (getauxval(AT_HWCAP) & (1ul << 7)) != 0; }  // HWCAP_CRC32
// Written as assembly because arm_acle.h hides the intrinsics unless the whole unit is built for +crc.
inline uint64_t step8(uint64_t c, const uint8_t* p) {
  uint64_t word;
  std::memcpy(&word, p, 8);
  uint32_t out;
  __asm__(".arch_extension crc\n\tcrc32cx %w0, %w1, %x2" : "=r"(out) : "r"(static_cast<uint32_t>(c)), "r"(word));
  return out;
}
inline uint64_t step1(uint64_t c, uint8_t b) {
  uint32_t out;
  __asm__(".arch_extension crc\n\tcrc32cb %w0, %w1, %w2" : "=r"(out) : "r"(static_cast<uint32_t>(c)), "r"(static_cast<uint32_t>(b)));
  return out;
}
#endif

FASTEE_CRC_TARGET uint32_t by_instruction(uint32_t crc, const uint8_t* p, size_t n) {
  uint64_t c = crc;
  if (n >= 4096) {
    // The instruction has a latency of 3 cycles and a throughput of 1: three thirds side by side, joined by two products.
    const size_t third = n / 24 * 8;
    uint64_t c1 = 0, c2 = 0;
    for (size_t i = 0; i < third; i += 8) {
      c = step8(c, p + i);
      c1 = step8(c1, p + third + i);
      c2 = step8(c2, p + 2 * third + i);
    }
    const uint32_t shift = shift_by(third);
    c = multiply(shift, multiply(shift, static_cast<uint32_t>(c)) ^ static_cast<uint32_t>(c1)) ^ static_cast<uint32_t>(c2);
    p += 3 * third, n -= 3 * third;
  }
  for (; n >= 8; n -= 8, p += 8) c = step8(c, p);
  for (; n; --n) c = step1(c, *p++);
  return static_cast<uint32_t>(c);
}
#else
bool has_instruction() { return false; }
uint32_t by_instruction(uint32_t c, const uint8_t* p, size_t n) { return by_table(c, p, n); }
#endif

}  // namespace

uint32_t crc32c(uint32_t crc, const void* data, size_t bytes) {
  static const bool fast = has_instruction();
  const auto* p = static_cast<const uint8_t*>(data);
  return ~(fast ? by_instruction(~crc, p, bytes) : by_table(~crc, p, bytes));
}

uint32_t crc32c_join(uint32_t a, uint32_t b, uint64_t b_bytes) { return multiply(shift_by(b_bytes), a) ^ b; }

}  // namespace fastee::net
