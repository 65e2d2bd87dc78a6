#include "kernels.h"

#define QTOOL_TABLE kPortable
#define QTOOL_NAME "portable"
#define QTOOL_BYTES 16
#include "kernels.inc"
