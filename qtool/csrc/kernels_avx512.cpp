#include "kernels.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#define QTOOL_TABLE kAvx512
#define QTOOL_NAME "avx512"
#define QTOOL_BYTES 64
#include "kernels.inc"
#endif
