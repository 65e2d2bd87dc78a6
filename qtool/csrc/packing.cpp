// Dense little-endian bit streams of codes, along rows or along columns, and the choice of instruction set.
#include "kernels.h"

#include <cstring>

const Kernels* choose_kernels(const char* force) {
  const bool any = force[0] == '\0';
#if defined(__x86_64__)
  if ((any || !std::strcmp(force, "avx512")) && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return &kAvx512;
  if ((any || !std::strcmp(force, "avx2")) && __builtin_cpu_supports("avx2")) return &kAvx2;
#endif
  return any || !std::strcmp(force, "portable") ? &kPortable : nullptr;
}

namespace {

// One code at bit position `at` of a stream whose words lie `stride` apart; it may straddle two words.
inline void put(uint32_t* words, int64_t stride, int64_t at, int64_t bits, uint32_t code) {
  const int64_t word = at >> 5, offset = at & 31;
  words[word * stride] |= code << offset;
  if (offset + bits > 32) words[(word + 1) * stride] |= code >> (32 - offset);
}

inline uint8_t get(const uint32_t* words, int64_t stride, int64_t at, int64_t bits) {
  const int64_t word = at >> 5, offset = at & 31;
  uint32_t code = words[word * stride] >> offset;
  if (offset + bits > 32) code |= words[(word + 1) * stride] << (32 - offset);
  return (uint8_t)(code & ((1u << bits) - 1));
}

}  // namespace

void pack_rows(const uint8_t* codes, int64_t count, int64_t, int64_t bits, uint32_t* words, int64_t begin, int64_t end) {
  const int64_t width = words_of(count, bits);
  for (int64_t row = begin; row < end; ++row) {
    uint32_t* out = words + row * width;
    std::memset(out, 0, width * sizeof(uint32_t));
    for (int64_t i = 0; i < count; ++i) put(out, 1, i * bits, bits, codes[row * count + i]);
  }
}

void unpack_rows(const uint32_t* words, int64_t count, int64_t, int64_t bits, uint8_t* codes, int64_t begin, int64_t end) {
  const int64_t width = words_of(count, bits);
  for (int64_t row = begin; row < end; ++row)
    for (int64_t i = 0; i < count; ++i) codes[row * count + i] = get(words + row * width, 1, i * bits, bits);
}

void pack_columns(const uint8_t* codes, int64_t count, int64_t width, int64_t bits, uint32_t* words, int64_t begin,
                  int64_t end) {
  for (int64_t word = 0; word < words_of(count, bits); ++word)
    for (int64_t column = begin; column < end; ++column) words[word * width + column] = 0;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t column = begin; column < end; ++column)
      put(words + column, width, i * bits, bits, codes[i * width + column]);
}

void unpack_columns(const uint32_t* words, int64_t count, int64_t width, int64_t bits, uint8_t* codes, int64_t begin,
                    int64_t end) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t column = begin; column < end; ++column)
      codes[i * width + column] = get(words + column, width, i * bits, bits);
}

// A field is {part, its lowest bit that is taken, bits, byte, where in that byte the bits begin}.
void pack_fields(const uint8_t* parts, const int32_t* fields, int64_t count, int64_t width, int64_t size,
                 uint8_t* packed, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const uint8_t* from = parts + block * width;
    uint8_t* to = packed + block * size;
    std::memset(to, 0, size);
    for (const int32_t* f = fields; f != fields + 5 * count; f += 5)
      to[f[3]] |= (uint8_t)(((from[f[0]] >> f[1]) & ((1 << f[2]) - 1)) << f[4]);
  }
}

void unpack_fields(const uint8_t* packed, const int32_t* fields, int64_t count, int64_t width, int64_t size,
                   uint8_t* parts, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const uint8_t* from = packed + block * size;
    uint8_t* to = parts + block * width;
    std::memset(to, 0, width);
    for (const int32_t* f = fields; f != fields + 5 * count; f += 5)
      to[f[0]] |= (uint8_t)(((from[f[3]] >> f[4]) & ((1 << f[2]) - 1)) << f[1]);
  }
}
