// How a tensor is cut into vectors, and how these form tiles. Files compiled for different instruction sets include this
// one, so its one function is static: of a shared function the linker would keep one copy, which the machine might not run.
//
// The data are [rows, groups, width], contiguous, so a row is groups * width scalars. Units cover a row from its start: a
// unit is what one vector holds, or a pair of vectors for bfloat16. The coefficients that a unit needs are an entry of a
// table. There is one entry for each group, for the units within it, and one for each unit that several groups share, where
// every lane has the coefficients of its group. A run is a sequence of units with the same entry. So a group of 384
// channels is a run of 24 units whose coefficients stay in registers, and groups of 1, 7 or 24 channels also fill their
// vectors.

#pragma once

#include <cstdint>

namespace grkan {

enum class Storage { float32, float64, float16, bfloat16, bfloat16_pairs };

struct Run {
  int64_t offset;  // of its first scalar in a row
  int64_t units;   // whole ones
  int64_t tail;    // scalars of a partial unit after them
  int64_t entry;
};

// Rows [first_row, last_row) of the runs [first_run, last_run).
struct Tile {
  int64_t first_row, last_row, first_run, last_run;
};

// The input of the vector code. S is float or double, the type of its arithmetic.
template <class S>
struct Plan {
  int64_t rows, row_size;  // row_size = groups * width
  int m, n;
  bool absolute;  // the form sum_of_abs
  // The range of |x|, besides 0, for the vector code, see `is_inside`. `smallest` is 0 for nearly all coefficients.
  S smallest, limit;
  const Run* runs;
  // The table: for each entry the lanes of a_0 .. a_m, b_1 .. b_n and, for the backward only, 1 a_1 .. m a_m, 1 b_1 ..
  // n b_n. In the form sum_of_abs b stands for |b|. Aligned to 64 bytes.
  const S* table;
};

// Whether the vector code is right for an x, given its absolute value, which is a scalar or a vector.
template <class S, class Size>
static inline __attribute__((always_inline)) auto is_inside(Size size, const Plan<S>& plan) {
  return (size <= plan.limit) & ((size >= plan.smallest) | (size == S(0)));
}

// For n > 0 the backward sums the terms times 2^scale. A term is (g / Q) x^i, and g / Q can underflow where the term does
// not; 1 / Q times 2^scale is 1 or more for the x that are inside.
template <class S>
constexpr int scale = sizeof(S) == 8 ? 512 : 64;

// In the worst case a sum of many equal terms is off by half a unit in the last place for each term. So only few terms are
// added in S: vectors, in registers, and then these sums, over a tile. The rest is added in double.
constexpr int64_t kVectorsTogether = 48, kSumsOfThem = 16;

// Vector code for one instruction set. `forward` and `backward` return whether all x of the tile were inside.
struct Kernels {
  int lanes_float, lanes_double;

  // y = F(x)
  bool (*forward)(Storage, const void* plan, const Tile&, const void* x, void* y);

  // Computes dx, y = F(x) if y is not null, and adds the sums for da_0 .. da_m, db_1 .. db_n to `sums`. `sums` has that many
  // vectors for each entry, after the same number for scratch. `skip` leaves out every scalar that is not inside, so that it
  // adds nothing to the sums.
  bool (*backward)(
      Storage, const void* plan, const Tile&, bool skip, const void* grad, const void* x, void* dx, void* y,
      void* sums);

  // Sums the lanes [first, last) of each of `count` vectors, in double.
  void (*fold)(Storage, const void* vectors, int64_t count, int64_t first, int64_t last, double* to);
};

const Kernels* portable_kernels();
#if defined(__x86_64__)
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
#endif

}  // namespace grkan
