// Vectors of 128 bits, which SSE2 and NEON have, and compilers make of anything else.
#include <cstdint>

#include "plan.h"

#define GRKAN_ISA portable
#define GRKAN_BYTES 16
#if defined(__FMA__) || defined(__aarch64__)
#define GRKAN_FMA
#endif
#include "tile.h"

namespace grkan {
const Kernels* portable_kernels() { return &portable::kernels; }
}  // namespace grkan
