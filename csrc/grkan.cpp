// The C interface.

#include "grkan.h"

#include "rational.h"

namespace {

// Adapts the interface's threads to rational.h.
struct Pool {
  GrkanParallelFor parallel_for;

  grkan::Threads threads() const { return {parallel_for ? run : nullptr, this}; }

  static bool run(const void* self, int64_t count, grkan::Threads::Body body, void* data) {
    return static_cast<const Pool*>(self)->parallel_for(0, count, 1, body, data) == 0;
  }
};

}  // namespace

int64_t grkan_interface() { return kGrkanInterface; }

const char* grkan_forward(
    GrkanParallelFor parallel_for, int64_t type, int64_t scalars, int64_t width, int64_t absolute,
    const void* numerator, int64_t numerator_type, int64_t numerator_rows, int64_t numerator_columns,
    const void* denominator, int64_t denominator_type, int64_t denominator_rows, int64_t denominator_columns,
    const void* x, void* y) {
  const grkan::Matrix a = {numerator, numerator_type, numerator_rows, numerator_columns};
  const grkan::Matrix b = {denominator, denominator_type, denominator_rows, denominator_columns};
  const Pool pool = {parallel_for};
  return grkan::forward({type, scalars, width, absolute != 0, a, b}, pool.threads(), x, y);
}

const char* grkan_backward(
    GrkanParallelFor parallel_for, int64_t type, int64_t scalars, int64_t width, int64_t absolute,
    const void* numerator, int64_t numerator_type, int64_t numerator_rows, int64_t numerator_columns,
    const void* denominator, int64_t denominator_type, int64_t denominator_rows, int64_t denominator_columns,
    const void* grad, const void* x, void* dx, void* da, void* db, void* y) {
  const grkan::Matrix a = {numerator, numerator_type, numerator_rows, numerator_columns};
  const grkan::Matrix b = {denominator, denominator_type, denominator_rows, denominator_columns};
  const Pool pool = {parallel_for};
  return grkan::backward({type, scalars, width, absolute != 0, a, b}, pool.threads(), grad, x, dx, da, db, y);
}
