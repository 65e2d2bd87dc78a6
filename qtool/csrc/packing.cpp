// Dense little-endian bit streams of codes, along rows or along columns, and the choice of instruction set.
#include "kernels.h"

#include <cstring>
#include <vector>

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

// `width` low bits of each lane of `lane` bits.
constexpr uint64_t low_bits(int width, int lane) {
  uint64_t mask = 0;
  for (int at = 0; at < 64; at += lane) mask |= ((1ull << width) - 1) << at;
  return mask;
}

// Eight codes that stand side by side, each in a byte of its own: halves are moved apart, then their halves, and theirs.
template <int bits>
inline uint64_t spread(uint64_t octet) {
  constexpr uint64_t four = low_bits(4 * bits, 64), two = low_bits(2 * bits, 32), one = low_bits(bits, 16);
  octet = (octet & four) | (octet >> (4 * bits) & four) << 32;
  octet = (octet & two) | (octet >> (2 * bits) & two) << 16;
  return (octet & one) | (octet >> bits & one) << 8;
}

// The inverse: of eight bytes their low bits, side by side.
template <int bits>
inline uint64_t gather(uint64_t octet) {
  constexpr uint64_t four = low_bits(4 * bits, 64), two = low_bits(2 * bits, 32), one = low_bits(bits, 16);
  octet = (octet & one) | (octet >> 8 & one) << bits;
  octet = (octet & two) | (octet >> 16 & two) << 2 * bits;
  return (octet & four) | (octet >> 32 & four) << 4 * bits;
}

// A row is a stream of bytes, too: eight codes fill `bits` of them.
template <int bits>
void pack_row(const uint8_t* codes, int64_t count, uint8_t* __restrict out) {
  if constexpr (bits == 4) {  // the commonest, in words that the compiler makes vectors of: two codes are a byte
    for (; count >= 64; count -= 64, codes += 64, out += 32)
      for (int i = 0; i < 32; ++i) out[i] = (uint8_t)((codes[2 * i] & 15) | codes[2 * i + 1] << 4);
  }
  for (; count >= 8; count -= 8, codes += 8, out += bits) {
    uint64_t octet;
    std::memcpy(&octet, codes, 8);
    octet = gather<bits>(octet);
    std::memcpy(out, &octet, bits);
  }
  if (count == 0) return;  // there may be no memory at all
  uint64_t rest = 0;
  for (int64_t i = 0; i < count; ++i) rest |= (uint64_t)codes[i] << (bits * i);
  std::memcpy(out, &rest, (count * bits + 7) / 8);
}

template <int bits>
void unpack_row(const uint8_t* bytes, int64_t count, uint8_t* __restrict codes) {
  if constexpr (bits == 4) {
    for (; count >= 64; count -= 64, codes += 64, bytes += 32)
      for (int i = 0; i < 32; ++i) {
        codes[2 * i] = bytes[i] & 15;
        codes[2 * i + 1] = bytes[i] >> 4;
      }
  }
  for (; count >= 8; count -= 8, codes += 8, bytes += bits) {
    uint64_t octet = 0;
    std::memcpy(&octet, bytes, bits);
    octet = spread<bits>(octet);
    std::memcpy(codes, &octet, 8);
  }
  if (count == 0) return;
  uint64_t rest = 0;
  std::memcpy(&rest, bytes, (count * bits + 7) / 8);
  rest = spread<bits>(rest);
  std::memcpy(codes, &rest, count);
}

constexpr decltype(&pack_row<1>) kPackRow[] = {pack_row<1>, pack_row<2>, pack_row<3>, pack_row<4>,
                                               pack_row<5>, pack_row<6>, pack_row<7>, pack_row<8>};
constexpr decltype(&unpack_row<1>) kUnpackRow[] = {unpack_row<1>, unpack_row<2>, unpack_row<3>, unpack_row<4>,
                                                   unpack_row<5>, unpack_row<6>, unpack_row<7>, unpack_row<8>};

// Words of several rows of codes, for bits that divide 32: a column is a lane.
template <int bits>
void pack_words(const uint8_t* codes, int64_t count, int64_t width, uint32_t* words, int64_t begin, int64_t end) {
  constexpr int64_t per_word = 32 / bits;
  for (int64_t first = 0; first < count; first += per_word, words += width)
    for (int64_t i = 0; i < per_word && first + i < count; ++i) {
      const uint8_t* row = codes + (first + i) * width;
      for (int64_t column = begin; column < end; ++column)
        words[column] = (i ? words[column] : 0) | (uint32_t)row[column] << (bits * i);
    }
}

template <int bits>
void unpack_words(const uint32_t* words, int64_t count, int64_t width, uint8_t* codes, int64_t begin, int64_t end) {
  constexpr int64_t per_word = 32 / bits;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t* row = words + i / per_word * width;
    const int shift = (int)(i % per_word) * bits;
    for (int64_t column = begin; column < end; ++column)
      codes[i * width + column] = (uint8_t)(row[column] >> shift & ((1u << bits) - 1));
  }
}

}  // namespace

void pack_rows(const uint8_t* codes, int64_t count, int64_t, int64_t bits, uint32_t* words, int64_t begin, int64_t end) {
  const int64_t width = words_of(count, bits);
  for (int64_t row = begin; row < end; ++row) {
    if (width > 0) words[(row + 1) * width - 1] = 0;  // what no code fills
    kPackRow[bits - 1](codes + row * count, count, reinterpret_cast<uint8_t*>(words + row * width));
  }
}

void unpack_rows(const uint32_t* words, int64_t count, int64_t, int64_t bits, uint8_t* codes, int64_t begin, int64_t end) {
  const int64_t width = words_of(count, bits);
  for (int64_t row = begin; row < end; ++row)
    kUnpackRow[bits - 1](reinterpret_cast<const uint8_t*>(words + row * width), count, codes + row * count);
}

void pack_columns(const uint8_t* codes, int64_t count, int64_t width, int64_t bits, uint32_t* words, int64_t begin,
                  int64_t end) {
  if (bits == 2) return pack_words<2>(codes, count, width, words, begin, end);
  if (bits == 4) return pack_words<4>(codes, count, width, words, begin, end);
  if (bits == 8) return pack_words<8>(codes, count, width, words, begin, end);
  for (int64_t word = 0; word < words_of(count, bits); ++word)
    for (int64_t column = begin; column < end; ++column) words[word * width + column] = 0;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t column = begin; column < end; ++column)
      put(words + column, width, i * bits, bits, codes[i * width + column]);
}

void unpack_columns(const uint32_t* words, int64_t count, int64_t width, int64_t bits, uint8_t* codes, int64_t begin,
                    int64_t end) {
  if (bits == 2) return unpack_words<2>(words, count, width, codes, begin, end);
  if (bits == 4) return unpack_words<4>(words, count, width, codes, begin, end);
  if (bits == 8) return unpack_words<8>(words, count, width, codes, begin, end);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t column = begin; column < end; ++column)
      codes[i * width + column] = get(words + column, width, i * bits, bits);
}

// A field is {part, its lowest bit that is taken, bits, byte, where in that byte the bits begin}. Fields whose parts and
// bytes follow each other are one run, which the compiler turns into vectors.
namespace {

struct Run {
  int64_t part, byte, length;
  int low, high;
  uint8_t mask;
};

std::vector<Run> runs_of(const int32_t* fields, int64_t count) {
  std::vector<Run> runs;
  for (const int32_t* f = fields; f != fields + 5 * count; f += 5) {
    const Run here{f[0], f[3], 1, f[1], f[4], (uint8_t)((1 << f[2]) - 1)};
    Run* last = runs.empty() ? nullptr : &runs.back();
    if (last && here.part == last->part + last->length && here.byte == last->byte + last->length &&
        here.low == last->low && here.high == last->high && here.mask == last->mask)
      ++last->length;
    else
      runs.push_back(here);
  }
  return runs;
}

// to |= (from >> down & mask) << up, for bytes. Eight of them at once give the same: no field leaves its byte.
inline void move_bits(const uint8_t* from, int down, uint8_t mask, int up, uint8_t* to, int64_t length) {
  for (; length >= 8; length -= 8, from += 8, to += 8) {
    uint64_t octet, there;
    std::memcpy(&octet, from, 8);
    std::memcpy(&there, to, 8);
    there |= (octet >> down & 0x0101010101010101u * mask) << up;
    std::memcpy(to, &there, 8);
  }
  for (; length > 0; --length, ++from, ++to) *to |= (uint8_t)((*from >> down & mask) << up);
}

}  // namespace

void pack_fields(const uint8_t* parts, const int32_t* fields, int64_t count, int64_t width, int64_t size,
                 uint8_t* packed, int64_t begin, int64_t end) {
  const std::vector<Run> runs = runs_of(fields, count);
  for (int64_t block = begin; block < end; ++block) {
    uint8_t* to = packed + block * size;
    std::memset(to, 0, size);
    for (const Run& run : runs)
      move_bits(parts + block * width + run.part, run.low, run.mask, run.high, to + run.byte, run.length);
  }
}

void unpack_fields(const uint8_t* packed, const int32_t* fields, int64_t count, int64_t width, int64_t size,
                   uint8_t* parts, int64_t begin, int64_t end) {
  const std::vector<Run> runs = runs_of(fields, count);
  for (int64_t block = begin; block < end; ++block) {
    uint8_t* to = parts + block * width;
    std::memset(to, 0, width);
    for (const Run& run : runs)
      move_bits(packed + block * size + run.byte, run.high, run.mask, run.low, to + run.part, run.length);
  }
}
