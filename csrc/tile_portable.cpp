// Vectors of 128 bits: SSE2 and NEON have them, and compilers emulate them elsewhere.
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstdint>

#include "plan.h"

#define GRKAN_ISA portable
#define GRKAN_BYTES 16
#if defined(__aarch64__)
#define GRKAN_FMA
#define GRKAN_FMA_FLOAT(x, y, z) (Real<float>) vfmaq_f32((float32x4_t)(z), (float32x4_t)(x), (float32x4_t)(y))
#define GRKAN_FMA_DOUBLE(x, y, z) (Real<double>) vfmaq_f64((float64x2_t)(z), (float64x2_t)(x), (float64x2_t)(y))
#endif
#include "tile.h"

namespace grkan {
const Kernels* portable_kernels() { return &portable::kernels; }
}  // namespace grkan
