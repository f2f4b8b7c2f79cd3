// The library's C interface: F and its gradients on the CPU, for callers that have pointers and sizes.
//
// x lies in memory without gaps, as [rows, groups, width]. Coefficients are matrices without gaps, of float32 or float64: the
// numerator has m + 1 columns, the denominator n, and each has a row for every group, or one row for all. The larger number
// of rows is the number of groups. y, grad and dx have the layout of x, da that of the numerator, and db that of the
// denominator. No result may overlap an argument in memory.
//
// Several threads may call the functions at once. They return nullptr, or a constant text that says what is wrong.

#pragma once

#include <cstdint>

#define GRKAN_EXPORT extern "C" __attribute__((visibility("default")))

// Changes whenever this file does, so that a caller can check that it was written for this library.
constexpr int64_t kGrkanInterface = 1;

// Types of scalars. All integers of the interface have 64 bits, so that callers without this file cannot get sizes wrong.
constexpr int64_t kGrkanFloat32 = 0, kGrkanFloat64 = 1, kGrkanFloat16 = 2, kGrkanBFloat16 = 3;

// Calls body(from, to, data) for pieces that together are [begin, end), on any threads, and returns when all are done: 0, or
// another number if it failed. PyTorch's torch_parallel_for is one such function. nullptr: use only the caller's thread.
typedef int32_t (*GrkanParallelFor)(
    int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t from, int64_t to, void* data), void* data);

GRKAN_EXPORT int64_t grkan_interface();

// Computes y = F(x), in the form sum_of_abs if `absolute` is not 0, else abs_of_sum.
GRKAN_EXPORT const char* grkan_forward(
    GrkanParallelFor parallel_for, int64_t type, int64_t scalars, int64_t width, int64_t absolute,
    const void* numerator, int64_t numerator_type, int64_t numerator_rows, int64_t numerator_columns,
    const void* denominator, int64_t denominator_type, int64_t denominator_rows, int64_t denominator_columns,
    const void* x, void* y);

// Computes the gradients of x, of the numerator and of the denominator; and y = F(x), unless y is nullptr.
GRKAN_EXPORT const char* grkan_backward(
    GrkanParallelFor parallel_for, int64_t type, int64_t scalars, int64_t width, int64_t absolute,
    const void* numerator, int64_t numerator_type, int64_t numerator_rows, int64_t numerator_columns,
    const void* denominator, int64_t denominator_type, int64_t denominator_rows, int64_t denominator_columns,
    const void* grad, const void* x, void* dx, void* da, void* db, void* y);
