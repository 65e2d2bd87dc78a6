#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,f16c")
#define QTOOL_TABLE kAvx2
#define QTOOL_NAME "avx2"
#define QTOOL_BYTES 32
#define QTOOL_WIDEN(a) ((Shorts)_mm256_cvtepi8_epi16((__m128i)(a)))
#define QTOOL_PAIRS(a, b) ((IntLanes)_mm256_madd_epi16((__m256i)(a), (__m256i)(b)))
#define QTOOL_BYTE_PAIRS(a, b) ((Shorts)_mm256_maddubs_epi16((__m256i)(a), (__m256i)(b)))
#define QTOOL_LOOK_UP(low, high, index)                                              \
  ((Lanes)_mm256_blendv_ps(_mm256_permutevar8x32_ps((__m256)(low), (__m256i)(index)),      \
                           _mm256_permutevar8x32_ps((__m256)(high), (__m256i)(index)),     \
                           (__m256)((index) << 28)))
#define QTOOL_ANY(mask) (_mm256_movemask_ps((__m256)(mask)) != 0)
#include "kernels.inc"
#endif
