#include "kernels.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,f16c")
#define QTOOL_TABLE kAvx2
#define QTOOL_NAME "avx2"
#define QTOOL_BYTES 32
#include "kernels.inc"
#endif
