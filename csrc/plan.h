// How a tensor is cut into vectors, and these into tiles. Files that are compiled for different instruction sets include
// this one, so there are no functions in it: the linker keeps one copy of an inline function, whatever the machine can run.
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
  // The |x|, besides 0, that the vector code may compute with. `smallest` is 0 for nearly all coefficients.
  S smallest, limit;
  const Run* runs;
  // The table: for each entry the lanes of a_0 .. a_m, b_1 .. b_n and, for the backward alone, 1 a_1 .. m a_m, 1 b_1 ..
  // n b_n. In the form sum_of_abs b stands for |b|. Aligned to 64 bytes.
  const S* table;
};

// Vector code for one instruction set. Both functions return whether all x of the tile were within the limits.
struct Kernels {
  int lanes_float, lanes_double;

  // y = F(x)
  bool (*forward)(Storage, const void* plan, const Tile&, const void* x, void* y);

  // dx, y = F(x) if y is not null, and the sums for da_0 .. da_m, db_1 .. db_n, added to sums: for each entry that many
  // vectors. `skip` leaves out every scalar beyond the limits: it adds nothing to the sums.
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
