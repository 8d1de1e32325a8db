// For processors with AVX-512. The standard headers come first: they must not be compiled for it.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "attention.h"
#include "paged.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
// Not all compilers define __F16C__ and the like after this pragma.
#define ATTNSERVE_F16C
#define ATTNSERVE_AVX512
#define ATTNSERVE_NAMESPACE avx512
#define ATTNSERVE_LANES 16
#define ATTNSERVE_VECTORS 3
#define ATTNSERVE_STEP 8
#include "attention_tiles.inc"
#include "paged_tiles.inc"
#include "paged_weights.inc"
#endif
