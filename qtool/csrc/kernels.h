// CPU kernels: pointers and integers only, no torch. Every function works on rows [begin, end) of row-major
// matrices, so that a caller can split rows over threads; no row looks at another.
//
// One source (kernels.inc) is compiled for three instruction sets. Rows are handled one per vector lane; sums of floats
// run over columns in order, without fused multiply-add. So all three give the same bits.
#pragma once

#include <cstdint>

constexpr int64_t kMaxColumns = 256;  // of solve_columns and refine_columns: their working tile is on the stack

enum ScaleType : int64_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kE4M3 = 3, kE8M0 = 4 };

struct FitOptions {
  int64_t columns, group, bits;
  bool symmetric, signed_scale;
  int64_t scale_type, steps, rounds;
  float shrink_min;
};

// A grid given by its levels, ascending; a quotient between levels i and i + 1 becomes i + 1 where it is above edge i.
struct Levels {
  const float *values, *edges;  // [count], [count - 1]
  int64_t count;
  bool e4m3;  // they are FP8's: found by arithmetic instead of a search
};

struct LevelFitOptions {
  int64_t columns, group, scale_type, steps, rounds;
  float shrink_min, top;  // top: the largest magnitude of a level
};

// Blocks of `super` columns with one d (and dmin) each, in sub-blocks of `sub` with integers scale_low .. scale_high that
// multiply d, and 0 .. mins that multiply dmin (mins 0: there is no minimum). See blocks.inc.
struct BlockFitOptions {
  int64_t columns, super, sub, scale_low, scale_high, mins, steps, rounds;
  float energy;
  bool uniform;  // the levels are consecutive integers
};

// A weight [rows, columns] as it lies in memory for running: see packed.inc. Columns are a multiple of 8 and of `group`,
// which is one too. words [tiles, ceil(columns / 32), bits, 32]; scale [tiles, columns / group, 32] in scale_type, the
// value is scale * level + offset; offset float32 like scale, or null; levels: the 16 of kTable.
enum PackedKind : int64_t { kIntegers = 0, kTable = 1, kSmallFloats = 2 };  // small: E4M3; kIntegers of 16, 32 bits: floats

constexpr int64_t kTileOfRows = 32;

struct PackedWeight {
  const int32_t* words;
  const void* scale;
  const float *offset, *levels;
  int64_t kind, bits, scale_type, rows, columns, group;
};

// One token's attention: heads of `size`, each key head serves heads / key_heads of them; the keys and values
// [key_heads, capacity, size] at positions first .. stop.
struct Attention {
  int64_t heads, key_heads, size, capacity, first, stop;
  float scaling;
};

// Additive codebooks: `books` of `words` codewords of kVector columns each; see codebooks.inc.
constexpr int64_t kVector = 8, kMaxCodebooks = 8, kMaxBeam = 16, kMaxWords = 1 << 16;

struct CodebookOptions {
  int64_t columns, books, words, beam;
};

// Words of eight 4-bit codes of a matrix [rows, 8 * blocks]; rows are a multiple of 8. See int4.inc.
enum Int4Layout : int64_t {
  kInt4Rows = 0,     // words [rows, blocks]: along the columns of a row
  kInt4Columns = 1,  // the same, transposed: [blocks, rows]
  kInt4Awq = 2       // [8 * blocks, rows / 8]: eight rows of a column, in the order 0, 2, 4, 6, 1, 3, 5, 7
};

struct Int4Shape {
  int64_t rows, blocks;
};

struct Kernels {
  const char* name;
  void (*fit_affine)(const float* weight, const float* importance, const FitOptions& options, float* scale,
                     uint8_t* zero, int64_t begin, int64_t end);
  void (*round_affine)(const float* weight, const float* scale, const uint8_t* zero, int64_t columns, int64_t group,
                       int64_t bits, uint8_t* codes, int64_t begin, int64_t end);
  void (*dequantize_affine)(const uint8_t* codes, const float* scale, const uint8_t* zero, int64_t columns,
                            int64_t group, float* values, int64_t begin, int64_t end);
  // weight, shift, codes, residual: [rows, columns]; factor [columns, columns]; scale, zero [rows, groups]
  void (*solve_columns)(const float* weight, const float* shift, const float* factor, const float* scale,
                        const uint8_t* zero, const int32_t* group_index, int64_t columns, int64_t groups, int64_t bits,
                        uint8_t* codes, float* residual, int64_t begin, int64_t end);
  void (*refine_columns)(const float* gradient, const float* hessian, const uint8_t* old_codes, const float* scale,
                         const uint8_t* zero, const int32_t* group_index, int64_t columns, int64_t groups,
                         int64_t bits, uint8_t* codes, float* delta, int64_t begin, int64_t end);
  // The same for grids of levels: value = scale * level.
  void (*fit_levels)(const float* weight, const float* importance, const LevelFitOptions& options, Levels levels,
                     float* scale, int64_t begin, int64_t end);
  void (*round_levels)(const float* weight, const float* scale, Levels levels, int64_t columns, int64_t group,
                       uint8_t* codes, int64_t begin, int64_t end);
  void (*dequantize_levels)(const uint8_t* codes, const float* scale, Levels levels, int64_t columns, int64_t group,
                            float* values, int64_t begin, int64_t end);
  void (*solve_levels)(const float* weight, const float* shift, const float* factor, const float* scale, Levels levels,
                       const int32_t* group_index, int64_t columns, int64_t groups, uint8_t* codes, float* residual,
                       int64_t begin, int64_t end);
  void (*refine_levels)(const float* gradient, const float* hessian, const uint8_t* old_codes, const float* scale,
                        Levels levels, const int32_t* group_index, int64_t columns, int64_t groups, uint8_t* codes,
                        float* delta, int64_t begin, int64_t end);
  // d, dmin [rows, columns / super]; scales (less scale_low), mins [rows, columns / sub]
  void (*fit_blocks)(const float* weight, const float* importance, const BlockFitOptions& options, Levels levels,
                     float* d, uint8_t* scales, float* dmin, uint8_t* mins, int64_t begin, int64_t end);
  // gradient, delta [rows, columns]; hessian [columns, columns]; codes [rows, columns / 8, books]; scale [rows];
  // codebooks [books, words, 8]; roots [columns / 8, 8, 8]: L of the diagonal blocks L Lᵀ of the Hessian
  void (*refine_codebooks)(const float* gradient, const float* hessian, const int32_t* old_codes, const float* scale,
                           const float* codebooks, const float* roots, const CodebookOptions& options, int32_t* codes,
                           float* delta, int64_t begin, int64_t end);
  void (*dequantize_codebooks)(const int32_t* codes, const float* codebooks, const float* scale, int64_t groups,
                               int64_t books, int64_t words, float* values, int64_t begin, int64_t end);
  // sums [books * words, 8] of the values of all `groups` that have the codeword. Here [begin, end) are codewords.
  void (*sum_codewords)(const float* values, const int32_t* codes, int64_t groups, int64_t books, int64_t words,
                        float* sums, int64_t begin, int64_t end);
  // product [tokens, outputs]: left [tokens, columns] times right [outputs, columns] transposed, summed as int32, times
  // the scales of both rows. Here [begin, end) are rows of `right`.
  void (*multiply_int8)(const int8_t* left, const int8_t* right, const float* left_scale, const float* right_scale,
                        int64_t tokens, int64_t columns, int64_t outputs, float* product, int64_t begin, int64_t end);
  // product [tokens, stride]: x [tokens, columns] times the transposed weight. Here [begin, end) are tiles of 32 rows.
  void (*multiply_packed)(const float* x, int64_t tokens, const PackedWeight& weight, float* product, int64_t stride,
                          int64_t begin, int64_t end);
  // values [columns, stride]: the transposed rows of the tiles, those of `begin` first.
  void (*unpack_packed)(const PackedWeight& weight, float* values, int64_t stride, int64_t begin, int64_t end);
  // The same for one token whose inputs are rounded to 8 bits, rounded.inc; of weights for which `rounds`.
  void (*round_input)(const float* x, int64_t columns, uint32_t* codes, float* scale, int32_t* sums, float* values);
  bool (*rounds)(const PackedWeight& weight);
  void (*multiply_rounded)(const uint32_t* codes, const float* scale, const int32_t* sums, const PackedWeight& weight,
                           float* product, int64_t begin, int64_t end);
  // A decoder block on one token, decode.inc. normalize: RMSNorm. rotate: RMSNorm where `norm` is not null, then the
  // rotary embedding, in place. attend: of heads [begin, end), into out [heads, size]. gate: silu(gate) * up into gate.
  void (*normalize)(const float* x, const float* weight, float epsilon, int64_t count, float* out);
  void (*rotate)(float* head, const float* norm, float epsilon, const float* cos, const float* sin, int64_t size);
  void (*attend)(const float* queries, const float* keys, const float* values, const Attention& options, float* out,
                 int64_t begin, int64_t end);
  void (*gate)(float* gate, const float* up, int64_t count);
  // Bit streams, little end first, codes [rows, count] <-> words [rows, words_of(count, bits)].
  void (*pack_rows)(const uint8_t* codes, int64_t count, int64_t rows, int64_t bits, uint32_t* words, int64_t begin,
                    int64_t end);
  void (*unpack_rows)(const uint32_t* words, int64_t count, int64_t rows, int64_t bits, uint8_t* codes, int64_t begin,
                      int64_t end);
  // Along the first dimension: codes [count, width] <-> words [words_of(count, bits), width]; columns [begin, end).
  void (*pack_columns)(const uint8_t* codes, int64_t count, int64_t width, int64_t bits, uint32_t* words, int64_t begin,
                       int64_t end);
  void (*unpack_columns)(const uint32_t* words, int64_t count, int64_t width, int64_t bits, uint8_t* codes,
                         int64_t begin, int64_t end);
  // Fields of bits: parts [blocks, parts] <-> packed [blocks, size]. fields [count, 5] says which bits go where.
  void (*pack_fields)(const uint8_t* parts, const int32_t* fields, int64_t count, int64_t width, int64_t size,
                      uint8_t* packed, int64_t begin, int64_t end);
  void (*unpack_fields)(const uint8_t* packed, const int32_t* fields, int64_t count, int64_t width, int64_t size,
                        uint8_t* parts, int64_t begin, int64_t end);
  // Here [begin, end) are blocks. differ [blocks]: 1 where a code of the block does.
  void (*repack_int4)(const uint32_t* words, const Int4Shape& shape, int64_t source, int64_t target, uint32_t* made,
                      int64_t begin, int64_t end);
  void (*compare_int4)(const uint32_t* one, const uint32_t* other, const Int4Shape& shape, int64_t layout,
                       int64_t other_layout, uint8_t* differ, int64_t begin, int64_t end);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// The kernels for this machine; force ("portable", "avx2", "avx512") is for tests. Null if it cannot run here.
const Kernels* choose_kernels(const char* force);

constexpr int64_t words_of(int64_t count, int64_t bits) { return (count * bits + 31) / 32; }

// packing.cpp: the same for every instruction set
void pack_rows(const uint8_t*, int64_t, int64_t, int64_t, uint32_t*, int64_t, int64_t);
void unpack_rows(const uint32_t*, int64_t, int64_t, int64_t, uint8_t*, int64_t, int64_t);
void pack_columns(const uint8_t*, int64_t, int64_t, int64_t, uint32_t*, int64_t, int64_t);
void unpack_columns(const uint32_t*, int64_t, int64_t, int64_t, uint8_t*, int64_t, int64_t);
void pack_fields(const uint8_t*, const int32_t*, int64_t, int64_t, int64_t, uint8_t*, int64_t, int64_t);
void unpack_fields(const uint8_t*, const int32_t*, int64_t, int64_t, int64_t, uint8_t*, int64_t, int64_t);
