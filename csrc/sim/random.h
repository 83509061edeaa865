// Counter-based random streams: a draw depends on the seed, the entity and how often that entity drew, on nothing else. A node
// more in the world therefore shifts nobody's numbers.
#pragma once
#include <cstdint>

namespace fastee::sim {

inline uint64_t scramble(uint64_t z) {  // the finaliser of splitmix64
  z += 0x9E3779B97F4A7C15ULL;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return z ^ (z >> 31);
}

// Stream kinds: 1 service times of node `id`, 2 fate of messages on the link `id` = source << 32 | target.
class Stream {
 public:
  Stream() = default;
  Stream(uint64_t seed, uint64_t kind, uint64_t id) : key_(scramble(scramble(scramble(seed) + kind) + id)) {}
  double uniform() { return static_cast<double>(scramble(key_ + count_++) >> 11) * 0x1p-53; }  // [0, 1)

 private:
  uint64_t key_ = 0, count_ = 0;
};

}  // namespace fastee::sim
