// F and its gradients, for the library's C interface and its operator for ONNX Runtime.

#pragma once

#include <cstdint>

namespace grkan {

// See grkan.h for the arguments of its functions.
struct Matrix {
  const void* data;
  int64_t type, rows, columns;
};
struct Call {
  int64_t type, scalars, width;
  bool absolute;
  Matrix numerator, denominator;
};

// The caller's threads: run(pool, count, body, data) calls body(from, to, data) for pieces that together are [0, count), and
// returns whether it succeeded. If `run` is null, the calling thread does the work.
struct Threads {
  typedef void (*Body)(int64_t from, int64_t to, void* data);
  bool (*run)(const void* pool, int64_t count, Body body, void* data);
  const void* pool;
};

// Both return nullptr, or a constant text that says what is wrong.
const char* forward(const Call&, const Threads&, const void* x, void* y);
const char* backward(
    const Call&, const Threads&, const void* grad, const void* x, void* dx, void* da, void* db, void* y);

}  // namespace grkan
