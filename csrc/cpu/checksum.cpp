// A checksum of memory, which tells whether weights are still those that something was derived from.
#include <cstring>
#include <vector>

#include "team.h"

namespace {

constexpr int64_t LANES = 64, BLOCK = 1 << 18;  // bytes that one thread takes at a time

// Two sums a lane, of the words and of the first sum (Fletcher): the second one tells where a word stands.
uint64_t block_checksum(const char* data, int64_t bytes) {
  uint32_t sums[LANES] = {}, weighted[LANES] = {}, words[LANES];
  int64_t i = 0;
  for (; i + int64_t(sizeof words) <= bytes; i += sizeof words) {
    std::memcpy(words, data + i, sizeof words);
    for (int64_t l = 0; l < LANES; ++l) weighted[l] += sums[l] += words[l];
  }
  std::memset(words, 0, sizeof words);
  std::memcpy(words, data + i, bytes - i);
  for (int64_t l = 0; l < LANES; ++l) weighted[l] += sums[l] += words[l];
  uint64_t hash = 14695981039346656037u;  // FNV-1a
  for (int64_t l = 0; l < LANES; ++l) hash = (hash ^ (uint64_t(weighted[l]) << 32 | sums[l])) * 1099511628211u;
  return hash;
}

}  // namespace

// The same for the same bytes, however many threads there are.
uint64_t checksum(uintptr_t address, int64_t bytes) {
  const char* const data = reinterpret_cast<const char*>(address);
  const int64_t blocks = (bytes + BLOCK - 1) / BLOCK;
  std::vector<uint64_t> hashes(blocks);
  parallel(team_size(double(bytes) / 8), [&](Team& team) {
    const auto [b0, b1] = team.share(blocks);
    for (int64_t b = b0; b < b1; ++b) hashes[b] = block_checksum(data + b * BLOCK, std::min(BLOCK, bytes - b * BLOCK));
  });
  uint64_t all = uint64_t(bytes);
  for (const uint64_t hash : hashes) all = (all ^ hash) * 1099511628211u + (all >> 29);
  return all;
}
