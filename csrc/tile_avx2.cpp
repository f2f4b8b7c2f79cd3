#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "plan.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define GRKAN_ISA avx2
#define GRKAN_BYTES 32
#define GRKAN_FMA
#define GRKAN_FMA_FLOAT(x, y, z) (Real<float>) _mm256_fmadd_ps((__m256)(x), (__m256)(y), (__m256)(z))
#define GRKAN_FMA_DOUBLE(x, y, z) (Real<double>) _mm256_fmadd_pd((__m256d)(x), (__m256d)(y), (__m256d)(z))
#define GRKAN_F16C
#define GRKAN_WIDEN_F16(h) (Floats) _mm256_cvtph_ps((__m128i)(h))
#define GRKAN_NARROW_F16(x) (Halves) _mm256_cvtps_ph((__m256)(x), _MM_FROUND_TO_NEAREST_INT)
#include "tile.h"

namespace grkan {
const Kernels* avx2_kernels() { return &avx2::kernels; }
}  // namespace grkan

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
