// How a tensor is cut into vectors, and these into tiles. Files that are compiled for different instruction sets include
// this one, so its one function is static: the linker keeps one copy of any other, whatever the machine can run.
//
// The data are [rows, groups, width], contiguous, so a row is groups * width scalars. It is covered from its start on by
// units: a unit is what one vector holds, or a pair of vectors for bfloat16. The coefficients that a unit needs are an
// entry of a table: one for each group, for the units that lie within it, and one for each unit that several groups share,
// where every lane has the coefficients of its group. A run is a sequence of units with the same entry. So a group of 384
// channels is a run of 24 units whose coefficients stay in registers, and groups of 1, 7 or 24 channels fill their vectors
// as well.

#pragma once

#include <cstdint>

namespace grkan {

enum class Storage { float32, float64, float16, bfloat16, bfloat16_pairs };

struct Run {
  int64_t offset;  // of its first scalar in a row
  int64_t units;   // whole ones
  int64_t tail;    // scalars of a partial unit behind them
  int64_t entry;
};

// Rows [first_row, last_row) of the runs [first_run, last_run).
struct Tile {
  int64_t first_row, last_row, first_run, last_run;
};

// What the vector code needs to know. S is float or double, the arithmetic's type.
template <class S>
struct Plan {
  int64_t rows, row_size;  // row_size = groups * width
  int m, n;
  bool absolute;  // the form sum_of_abs
  // The |x|, besides 0, that the vector code may compute with, see `is_inside`. `smallest` is 0 for nearly all coefficients.
  S smallest, limit;
  const Run* runs;
  // The table: for each entry the lanes of a_0 .. a_m, b_1 .. b_n and, for the backward alone, 1 a_1 .. m a_m, 1 b_1 ..
  // n b_n. In the form sum_of_abs b stands for |b|. Aligned to 64 bytes.
  const S* table;
};

// Whether the vector code is right about an x, by its absolute value, which is a scalar or a vector.
template <class S, class Size>
static inline __attribute__((always_inline)) auto is_inside(Size size, const Plan<S>& plan) {
  return (size <= plan.limit) & ((size >= plan.smallest) | (size == S(0)));
}

// The sums of the backward are those of the terms times this power of two, for n > 0. A term is (g / Q) x^i, and g / Q can
// underflow where the term does not; 1 / Q times 2^scale is 1 or more for the x that are inside.
template <class S>
constexpr int scale = sizeof(S) == 8 ? 512 : 64;

// Sums of many equal terms are off by half a unit in the last place for each term in the worst of cases. So what is added up
// in S is not much: vectors, in registers, and then these sums, over a tile. The rest is in double.
constexpr int64_t kVectorsTogether = 48, kSumsOfThem = 16;

// Vector code for one instruction set. Both functions return whether all x of the tile were inside.
struct Kernels {
  int lanes_float, lanes_double;

  // y = F(x)
  bool (*forward)(Storage, const void* plan, const Tile&, const void* x, void* y);

  // dx, y = F(x) if y is not null, and the sums for da_0 .. da_m, db_1 .. db_n, added to `sums`: for each entry that many
  // vectors, behind as many that are only worked with. `skip` leaves out every scalar that is not inside: it adds nothing
  // to the sums.
  bool (*backward)(
      Storage, const void* plan, const Tile&, bool skip, const void* grad, const void* x, void* dx, void* y,
      void* sums);
};

const Kernels* portable_kernels();
#if defined(__x86_64__)
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
#endif

}  // namespace grkan
