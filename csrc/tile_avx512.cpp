#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "plan.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define GRKAN_ISA avx512
#define GRKAN_BYTES 64
#define GRKAN_FMA
#define GRKAN_FMA_FLOAT(x, y, z) (Real<float>) _mm512_fmadd_ps((__m512)(x), (__m512)(y), (__m512)(z))
#define GRKAN_FMA_DOUBLE(x, y, z) (Real<double>) _mm512_fmadd_pd((__m512d)(x), (__m512d)(y), (__m512d)(z))
#define GRKAN_F16C
#define GRKAN_WIDEN_F16(h) (Floats) _mm512_cvtph_ps((__m256i)(h))
#define GRKAN_NARROW_F16(x) (Halves) _mm512_cvtps_ph((__m512)(x), _MM_FROUND_TO_NEAREST_INT)
#include "tile.h"

namespace grkan {
const Kernels* avx512_kernels() { return &avx512::kernels; }
}  // namespace grkan

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
