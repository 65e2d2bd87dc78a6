#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,f16c")
#define QTOOL_TABLE kAvx2
#define QTOOL_NAME "avx2"
#define QTOOL_BYTES 32
#define QTOOL_WIDEN(a) ((Shorts)_mm256_cvtepi8_epi16((__m128i)(a)))
#define QTOOL_PAIRS(a, b) ((IntLanes)_mm256_madd_epi16((__m256i)(a), (__m256i)(b)))
#include "kernels.inc"
#endif
