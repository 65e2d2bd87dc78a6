#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#define QTOOL_TABLE kAvx512
#define QTOOL_NAME "avx512"
#define QTOOL_BYTES 64
#define QTOOL_WIDEN(a) ((Shorts)_mm512_cvtepi8_epi16((__m256i)(a)))
#define QTOOL_PAIRS(a, b) ((IntLanes)_mm512_madd_epi16((__m512i)(a), (__m512i)(b)))
#define QTOOL_BYTE_PAIRS(a, b) ((Shorts)_mm512_maddubs_epi16((__m512i)(a), (__m512i)(b)))
#define QTOOL_LOOK_UP(low, high, index) ((Lanes)_mm512_permutexvar_ps((__m512i)(index), (__m512)(low)))
#define QTOOL_ANY(mask) (_mm512_test_epi32_mask((__m512i)(mask), (__m512i)(mask)) != 0)
#include "kernels.inc"
#endif
