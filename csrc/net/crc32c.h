// CRC32C (Castagnoli), the checksum of a wire frame: extend it over bytes, join two of them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastee::net {

// The checksum of what `crc` covers followed by `bytes` of `data`; 0 covers nothing.
uint32_t crc32c(uint32_t crc, const void* data, size_t bytes);

// The checksum of A followed by B from crc32c(A), crc32c(B) and the bytes of B: a header can be restamped without reading the payload anew.
uint32_t crc32c_join(uint32_t a, uint32_t b, uint64_t b_bytes);

}  // namespace fastee::net
