// The vector code: F and its gradients on one tile. It is compiled once for each instruction set, by files that define
//
//     GRKAN_ISA     a namespace
//     GRKAN_BYTES   the size of a vector: 16, 32 or 64
//     GRKAN_FMA     if there are fused multiply-adds: GRKAN_FMA_FLOAT and GRKAN_FMA_DOUBLE of three vectors. Other products
//                   and sums contract to them by -ffp-contract=fast, only for speed
//     GRKAN_F16C    if there are GRKAN_WIDEN_F16 and GRKAN_NARROW_F16
//
// and that may turn on instructions after including the headers of the standard library. Inline functions of those headers
// must not be compiled for instructions that the machine may lack, so nothing of the standard library is used below.
//
// Vectors are those of GCC and Clang, with element-wise operators.

namespace grkan {
namespace GRKAN_ISA {

#define GRKAN_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define GRKAN_UNROLL  // Clang unrolls anyway
#else
#define GRKAN_UNROLL _Pragma("GCC unroll 16")
#endif

template <class S>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Real __attribute__((vector_size(GRKAN_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(GRKAN_BYTES)));
  typedef uint32_t Unsigned __attribute__((vector_size(GRKAN_BYTES)));
  static constexpr int32_t sign = INT32_MIN;
};
template <>
struct VectorOf<double> {
  typedef double Real __attribute__((vector_size(GRKAN_BYTES)));
  typedef int64_t Bits __attribute__((vector_size(GRKAN_BYTES)));
  typedef uint64_t Unsigned __attribute__((vector_size(GRKAN_BYTES)));
  static constexpr int64_t sign = INT64_MIN;
};
template <class S>
using Real = typename VectorOf<S>::Real;
template <class S>
using Bits = typename VectorOf<S>::Bits;
template <class S>
constexpr int lanes = GRKAN_BYTES / sizeof(S);

typedef float Floats __attribute__((vector_size(GRKAN_BYTES)));
typedef uint32_t Words __attribute__((vector_size(GRKAN_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(GRKAN_BYTES / 2)));

// Types of 16 bits. float32 and float64 are stored in the type that they are computed in.
struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};
// bfloat16 read as words of 32 bits that hold two each. One vector of the even scalars and one of the odd ones take two
// operations; widening them side by side takes twice as many, and narrowing three times as many.
struct bfloat16_pairs {
  uint16_t bits;
};

// Rounds to the nearest, ties to even; the result is in the upper halves. A NaN stays one, because its lower half is zero: it
// was read from 16 bits, was computed, or comes from the coefficients, for which `make_table` ensures that.
GRKAN_INLINE Words round_to_bfloat16(Floats x) { return (Words)x + 0x7fff + (((Words)x >> 16) & 1); }

GRKAN_INLINE Floats widen(Halves h, bfloat16) { return (Floats)(__builtin_convertvector(h, Words) << 16); }
GRKAN_INLINE Halves narrow(Floats x, bfloat16) { return __builtin_convertvector(round_to_bfloat16(x) >> 16, Halves); }

#if defined(GRKAN_F16C)
GRKAN_INLINE Floats widen(Halves h, float16) { return GRKAN_WIDEN_F16(h); }
GRKAN_INLINE Halves narrow(Floats x, float16) { return GRKAN_NARROW_F16(x); }
#else
// Conversions by arithmetic on the bits, as few machines of interest lack these instructions.
GRKAN_INLINE Floats widen(Halves h, float16) {
  Words w = __builtin_convertvector(h, Words), sign = (w & 0x8000) << 16, rest = w & 0x7fff;
  // After the shift the exponent is too small by 112: multiplying by 2^112 corrects normal and subnormal numbers alike.
  Floats scaled = (Floats)(rest << 13) * 0x1p112f;
  Words special = (Words)(rest >= 0x7c00);
  return (Floats)(sign | (special & (0x7f800000 | (rest << 13))) | (~special & (Words)scaled));
}

GRKAN_INLINE Halves narrow(Floats x, float16) {
  Words bits = (Words)x, sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  // Normal numbers: round to the nearest, ties to even, and move the exponent by 112; what is too large becomes infinity.
  Words normal = (rest + 0xfff + ((rest >> 13) & 1) - (112u << 23)) >> 13;
  Words overflows = (Words)(rest >= 0x477ff000);
  normal = (overflows & 0x7c00) | (~overflows & normal);
  // Subnormal numbers: adding 0.5 rounds to units of 2^-24, which are then the last bits.
  Words subnormal = (Words)((Floats)rest + 0.5f) - 0x3f000000;
  Words small = (Words)(rest < 0x38800000);
  Words half = (small & subnormal) | (~small & normal);
  Words is_nan = (Words)(rest > 0x7f800000);
  half = (is_nan & 0x7e00) | (~is_nan & half);
  return __builtin_convertvector(half | sign, Halves);
}
#endif

template <class T>
struct ArithmeticOf {
  typedef float type;
};
template <>
struct ArithmeticOf<double> {
  typedef double type;
};
template <class T>
using Arithmetic = typename ArithmeticOf<T>::type;

// A unit is read and written at once: one vector, or a pair.
template <class T>
constexpr int vectors = __is_same(T, bfloat16_pairs) ? 2 : 1;
template <class T>
constexpr int unit = lanes<Arithmetic<T>> * vectors<T>;

template <class T>
GRKAN_INLINE void load(const T* p, Real<Arithmetic<T>>* x) {
  if constexpr (vectors<T> == 2) {
    Words words;
    __builtin_memcpy(&words, p, sizeof words);
    x[0] = (Floats)(words << 16);
    x[1] = (Floats)(words & 0xffff0000);
  } else if constexpr (sizeof(T) == 2) {
    Halves h;
    __builtin_memcpy(&h, p, sizeof h);
    *x = widen(h, T());
  } else {
    __builtin_memcpy(x, p, sizeof *x);
  }
}

template <class T>
GRKAN_INLINE void store(T* p, const Real<Arithmetic<T>>* x) {
  if constexpr (vectors<T> == 2) {
    Words words = (round_to_bfloat16(x[0]) >> 16) | (round_to_bfloat16(x[1]) & 0xffff0000);
    __builtin_memcpy(p, &words, sizeof words);
  } else if constexpr (sizeof(T) == 2) {
    Halves h = narrow(*x, T());
    __builtin_memcpy(p, &h, sizeof h);
  } else {
    __builtin_memcpy(p, x, sizeof *x);
  }
}

// A buffer for the rest of a row after its last whole unit.
template <class T>
struct Partial {
  T values[unit<T>] = {};
};

// Orders with code of their own, and any other order.

template <int M, int N>
struct Fixed {
  explicit Fixed(const int, const int) {}
  static constexpr int m = M, n = N, highest = M > N ? M : N;
  static constexpr int sums = M + 1 + N, entry = 2 * M + 1 + 2 * N;
};
struct Any {
  int m, n, highest, sums, entry;
  explicit Any(int m, int n) : m(m), n(n), highest(m > n ? m : n), sums(m + 1 + n), entry(2 * m + 1 + 2 * n) {}
};

struct No {
  static constexpr bool value = false;
};
struct Yes {
  static constexpr bool value = true;
};

template <class S>
GRKAN_INLINE Real<S> absolute(Real<S> x) {
  return (Real<S>)((Bits<S>)x & ~VectorOf<S>::sign);
}

// Returns the sign bit of x, but that of +0 for both zeros.
template <class S>
GRKAN_INLINE Bits<S> sign_bit(Real<S> x) {
  return (Bits<S>)(x + S(0)) & VectorOf<S>::sign;
}

template <class S>
GRKAN_INLINE Real<S> flip(Real<S> x, Bits<S> sign) {
  return (Real<S>)((Bits<S>)x ^ sign);
}

template <class S>
GRKAN_INLINE Real<S> horner(const Real<S>* c, int degree, Real<S> x) {
  Real<S> value = c[degree];
  GRKAN_UNROLL
  for (int i = degree - 1; i >= 0; --i) value = value * x + c[i];
  return value;
}

#if defined(GRKAN_FMA)
GRKAN_INLINE Real<float> fused(Real<float> x, Real<float> y, Real<float> z) { return GRKAN_FMA_FLOAT(x, y, z); }
GRKAN_INLINE Real<double> fused(Real<double> x, Real<double> y, Real<double> z) { return GRKAN_FMA_DOUBLE(x, y, z); }
#endif

// Computes A(t), for n >= 1. A zero becomes +0, as sign(0) is +1 by convention, but a product that underflows keeps its sign.
template <class S>
GRKAN_INLINE Real<S> inner(const Real<S>* b, int n, Real<S> t) {
  Real<S> last = horner<S>(b, n - 1, t);
#if defined(GRKAN_FMA)
  return fused(last, t, Real<S>{});  // adding +0 to the product before rounding does exactly that
#else
  Bits<S> zero = (last == S(0)) | (t == S(0));
  Bits<S> sign = ((Bits<S>)last ^ (Bits<S>)t) & VectorOf<S>::sign & ~zero;
  return (Real<S>)(((Bits<S>)(last * t) & ~VectorOf<S>::sign) | sign);
#endif
}

template <class S, bool Absolute, class O>
GRKAN_INLINE Real<S> value(Real<S> x, const Real<S>* c, const O& o) {
  Real<S> p = horner<S>(c, o.m, x);
  if (o.n == 0) return o.m == 0 ? p + S(0) * x : p;  // NaN stays NaN
  Real<S> a = inner<S>(c + o.m + 1, o.n, Absolute ? absolute<S>(x) : x);
  return p / (S(1) + (Absolute ? a : absolute<S>(a)));
}

// Returns dx, adds the terms of da and db to sums, and stores F in y.
//
// With u = g / Q and v = -s F: da_i += u x^i, db_j += u x^j v, dx = g ((P' + v A') / Q). Products in this order underflow no
// sooner than their results, if u, and so the sums, are multiplied by 2^scale; n = 0 needs no scale, as there is no division.
template <class S, bool Absolute, class O>
GRKAN_INLINE Real<S> gradient(Real<S> g, Real<S> x, const Real<S>* c, Real<S>* sums, Real<S>& y, const O& o) {
  const Real<S>*a = c, *b = a + o.m + 1, *da = b + o.n, *db = da + o.m;
  Real<S> p = horner<S>(a, o.m, x), inverse = Real<S>{} + S(1), u = g, v = {}, odd = {}, slope = {};
  if (o.n > 0) {
    Real<S> t = Absolute ? absolute<S>(x) : x;
    Real<S> inside = inner<S>(b, o.n, t);
    inverse = S(1) / (S(1) + (Absolute ? inside : absolute<S>(inside)));
    // Adds scale to the exponent. Unsigned, because that of NaN may wrap around.
    typedef typename VectorOf<S>::Unsigned Unsigned;
    constexpr int fraction = sizeof(S) == 8 ? 52 : 23;
    u = g * (Real<S>)((Unsigned)inverse + ((Unsigned{} + scale<S>) << fraction));
    y = p * inverse;
    slope = horner<S>(db, o.n - 1, t);
    if (Absolute) {
      v = -y;
      odd = flip<S>(v, sign_bit<S>(x));  // for odd powers: db needs powers of |x|, and the loop below has those of x
      slope = flip<S>(slope, sign_bit<S>(x));
    } else {
      v = odd = flip<S>(y, ~(Bits<S>)inside & VectorOf<S>::sign);
    }
  } else {
    y = p;
  }
  Real<S> derivative = v * slope;
  if (o.m > 0) derivative += horner<S>(da, o.m - 1, x);
  Real<S> term = u;
  sums[0] += term;
  GRKAN_UNROLL
  for (int i = 1; i <= o.highest; ++i) {
    term *= x;
    if (i <= o.m) sums[i] += term;
    if (i <= o.n) sums[o.m + i] += term * (i % 2 ? odd : v);
  }
  return g * (inverse * derivative);
}

// Keeps the largest |x| so far, as its bits: compared as integers, floats keep their order, with NaN above all. An x that is
// too small counts as NaN; only `Any` looks for these.
template <class S, class O>
GRKAN_INLINE void widen_range(Bits<S>& largest, Real<S> x, const Plan<S>& plan) {
  Bits<S> bits = (Bits<S>)x & ~VectorOf<S>::sign;
  if constexpr (__is_same(O, Any)) {
    bits |= ~is_inside((Real<S>)bits, plan) & ~VectorOf<S>::sign;
  }
  largest = bits > largest ? bits : largest;
}

template <class S>
GRKAN_INLINE bool within(Bits<S> largest, const Plan<S>& plan) {
  decltype(VectorOf<S>::sign + 0) limit;
  __builtin_memcpy(&limit, &plan.limit, sizeof limit);
  bool fits = true;
  for (int i = 0; i < lanes<S>; ++i) fits &= largest[i] <= limit;
  return fits;
}

// The number of rows processed together, so that the coefficients of a short run are fetched once for all of them. It is
// small, because memory is fastest row after row.
GRKAN_INLINE int64_t rows_together(const Run& run) { return run.units >= 16 ? 1 : 16 / (run.units + 1); }

// The same for the backward, where sums stay in registers meanwhile. A long run takes one row. Short ones take about as many
// rows as 32 KB hold, but at least a quarter of what may be summed, or there would be too many such sums to add in S. A tile
// has as many rows in each of its parts.
template <class T>
GRKAN_INLINE int64_t rows_summed_together(const Run& run, int64_t row_size, int64_t rows) {
  const int64_t of_row = (run.units + (run.tail > 0)) * vectors<T>, near = 32768 / (row_size * int64_t(sizeof(T)));
  if (4 * of_row >= kVectorsTogether) return 1;
  const int64_t most = kVectorsTogether / of_row, least = (kVectorsTogether / 4 + of_row - 1) / of_row;
  const int64_t wanted = near < least ? least : near;
  const int64_t at_most = rows / wanted, at_least = (rows + most - 1) / most, parts = at_most > at_least ? at_most : at_least;
  return (rows + parts - 1) / parts;
}

// Fetches what lies `ahead` scalars behind p. An address beyond the end does no harm. Rows that are processed together are read
// run by run, in steps of a row, which the processor does not foresee; so while it works on some rows, the next ones are
// fetched, as many scalars ahead, into the second-level cache: the first one could not hold them until they are needed.
template <bool Write, int Locality, class T>
GRKAN_INLINE void prefetch(const T* p, int64_t ahead) {
  __builtin_prefetch(p + ahead, Write, Locality);
}

template <class T, bool Absolute, class O>
static bool forward_order(const Plan<Arithmetic<T>>& plan, const Tile& tile, const T* x, T* y, const O& o) {
  typedef Arithmetic<T> S;
  Bits<S> largest = {};
  const int64_t size = plan.row_size, together = rows_together(plan.runs[tile.first_run]);
  auto one = [&](const T* from, T* to, const Real<S>* c) __attribute__((always_inline)) {
    Real<S> z[vectors<T>];
    load(from, z);
  GRKAN_UNROLL
    for (int i = 0; i < vectors<T>; ++i) {
      widen_range<S, O>(largest, z[i], plan);
      z[i] = value<S, Absolute>(z[i], c, o);
    }
    store(to, z);
  };
  for (int64_t first = tile.first_row; first < tile.last_row; first += together) {
    const int64_t last = first + together < tile.last_row ? first + together : tile.last_row;
    for (int64_t k = tile.first_run; k < tile.last_run; ++k) {
      const Run run = plan.runs[k];
      const Real<S>* c = reinterpret_cast<const Real<S>*>(plan.table) + run.entry * o.sums;
      Real<S> copy[16];
      if constexpr (!__is_same(O, Any)) {  // a copy stays in registers, as no store can change it
  GRKAN_UNROLL
        for (int i = 0; i < o.sums; ++i) copy[i] = c[i];
        c = copy;
      }
      auto rows = [&](auto fetch) __attribute__((always_inline)) {
        for (int64_t row = first; row < last; ++row) {
          const T* from = x + row * size + run.offset;
          T* to = y + row * size + run.offset;
          const int64_t whole = run.units * unit<T>;
          for (int64_t i = 0; i < whole; i += unit<T>) {
            if constexpr (fetch.value) {
              prefetch<false, 2>(from + i, together * size);
              prefetch<true, 2>(to + i, together * size);
            }
            one(from + i, to + i, c);
          }
          if (run.tail) {
            Partial<T> buffer;
            __builtin_memcpy(buffer.values, from + whole, run.tail * sizeof(T));
            one(buffer.values, buffer.values, c);
            __builtin_memcpy(to + whole, buffer.values, run.tail * sizeof(T));
          }
        }
      };
      // Any other order has one loop for all widths, or compiling would take too long.
      if (!__is_same(O, Any) && together > 1 && run.units > 1)
        rows(Yes());
      else  // two streams nearly in the order of memory
        rows(No());
    }
  }
  return within<S>(largest, plan);
}

template <class T, bool Absolute, bool Skip, bool Output, class O>
static bool backward_order(
    const Plan<Arithmetic<T>>& plan,
    const Tile& tile,
    const T* grad,
    const T* x,
    T* dx,
    T* y,
    Arithmetic<T>* all_sums,
    const O& o) {
  typedef Arithmetic<T> S;
  Bits<S> largest = {};
  auto one = [&](const T* grad, const T* x, T* dx, T* y, const Real<S>* c, Real<S>* sums) __attribute__((always_inline)) {
    Real<S> z[vectors<T>], g[vectors<T>], f[vectors<T>];
    load(x, z);
    load(grad, g);
  GRKAN_UNROLL
    for (int i = 0; i < vectors<T>; ++i) {
      if constexpr (Skip) {
        Bits<S> inside = is_inside(absolute<S>(z[i]), plan);
        z[i] = (Real<S>)((Bits<S>)z[i] & inside);
        g[i] = (Real<S>)((Bits<S>)g[i] & inside);
      } else {
        widen_range<S, O>(largest, z[i], plan);
      }
      g[i] = gradient<S, Absolute>(g[i], z[i], c, sums, f[i], o);
    }
    store(dx, g);
    if constexpr (Output) store(y, f);
  };
  const int64_t size = plan.row_size, together = rows_summed_together<T>(plan.runs[tile.first_run], size, tile.last_row - tile.first_row);
  for (int64_t first = tile.first_row; first < tile.last_row; first += together) {
    const int64_t last = first + together < tile.last_row ? first + together : tile.last_row;
    for (int64_t k = tile.first_run; k < tile.last_run; ++k) {
      const Run run = plan.runs[k];
      const Real<S>* c = reinterpret_cast<const Real<S>*>(plan.table) + run.entry * o.entry;
      Real<S> registers[16], *sums = __is_same(O, Any) ? reinterpret_cast<Real<S>*>(all_sums) : registers;
  GRKAN_UNROLL
      for (int i = 0; i < o.sums; ++i) sums[i] = Real<S>{};
      auto rows = [&](auto in_steps) __attribute__((always_inline)) {
        for (int64_t row = first; row < last; ++row) {
          const int64_t start = row * size + run.offset, end = start + run.units * unit<T>;
          for (int64_t i = start; i < end; i += unit<T>) {
            if constexpr (in_steps.value) {
              prefetch<false, 2>(grad + i, together * size);
              prefetch<false, 2>(x + i, together * size);
              prefetch<true, 2>(dx + i, together * size);
            } else if constexpr (sizeof(T) > 2) {  // three streams; 16 bits need half the bandwidth: 3 % faster without
              constexpr int64_t ahead = 2048 / sizeof(T);
              prefetch<false, 3>(grad + i, ahead);
              prefetch<false, 3>(x + i, ahead);
              prefetch<true, 3>(dx + i, ahead);
            }
            one(grad + i, x + i, dx + i, Output ? y + i : nullptr, c, sums);
          }
          if (run.tail) {
            Partial<T> g, from, to, value;
            __builtin_memcpy(g.values, grad + end, run.tail * sizeof(T));
            __builtin_memcpy(from.values, x + end, run.tail * sizeof(T));
            one(g.values, from.values, to.values, value.values, c, sums);
            __builtin_memcpy(dx + end, to.values, run.tail * sizeof(T));
            if (Output) __builtin_memcpy(y + end, value.values, run.tail * sizeof(T));
          }
        }
      };
      if (!__is_same(O, Any) && together > 1)
        rows(Yes());
      else
        rows(No());
      Real<S>* total = reinterpret_cast<Real<S>*>(all_sums) + (run.entry + 1) * o.sums;
  GRKAN_UNROLL
      for (int i = 0; i < o.sums; ++i) total[i] += sums[i];
    }
  }
  return within<S>(largest, plan);
}

// From values to template arguments.

template <class S, class F>
GRKAN_INLINE bool with_order(const Plan<S>& plan, const F& f) {
  if (plan.smallest > 0) return f(Any(plan.m, plan.n));
  if (plan.m == 5 && plan.n == 4) return f(Fixed<5, 4>(5, 4));
  if (plan.m == 7 && plan.n == 6) return f(Fixed<7, 6>(7, 6));
  return f(Any(plan.m, plan.n));
}

template <class T>
static bool forward_type(const void* plan_, const Tile& tile, const void* x_, void* y_) {
  const auto& plan = *static_cast<const Plan<Arithmetic<T>>*>(plan_);
  const T* x = static_cast<const T*>(x_);
  T* y = static_cast<T*>(y_);
  return with_order(plan, [&](auto o) {
    return plan.absolute ? forward_order<T, true>(plan, tile, x, y, o) : forward_order<T, false>(plan, tile, x, y, o);
  });
}

template <class T>
static bool backward_type(
    const void* plan_, const Tile& tile, bool skip, const void* grad_, const void* x_, void* dx_, void* y_, void* sums_) {
  typedef Arithmetic<T> S;
  const auto& plan = *static_cast<const Plan<S>*>(plan_);
  const T *grad = static_cast<const T*>(grad_), *x = static_cast<const T*>(x_);
  T *dx = static_cast<T*>(dx_), *y = static_cast<T*>(y_);
  S* sums = static_cast<S*>(sums_);
  auto run = [&](auto absolute, auto skip, auto output, auto o) {
    return backward_order<T, absolute.value, skip.value, output.value>(plan, tile, grad, x, dx, y, sums, o);
  };
  auto with_output = [&](auto absolute, auto skip, auto o) {
    return y ? run(absolute, skip, Yes(), o) : run(absolute, skip, No(), o);
  };
  auto with_form = [&](auto skip, auto o) {
    return plan.absolute ? with_output(Yes(), skip, o) : with_output(No(), skip, o);
  };
  if (skip) return with_form(Yes(), Any(plan.m, plan.n));  // too rare to need code for each order
  return with_order(plan, [&](auto o) { return with_form(No(), o); });
}

static bool forward(Storage type, const void* plan, const Tile& tile, const void* x, void* y) {
  switch (type) {
    case Storage::float32: return forward_type<float>(plan, tile, x, y);
    case Storage::float64: return forward_type<double>(plan, tile, x, y);
    case Storage::bfloat16: return forward_type<bfloat16>(plan, tile, x, y);
    case Storage::bfloat16_pairs: return forward_type<bfloat16_pairs>(plan, tile, x, y);
    default: return forward_type<float16>(plan, tile, x, y);
  }
}

static bool backward(
    Storage type, const void* plan, const Tile& tile, bool skip, const void* grad, const void* x, void* dx, void* y, void* sums) {
  switch (type) {
    case Storage::float32: return backward_type<float>(plan, tile, skip, grad, x, dx, y, sums);
    case Storage::float64: return backward_type<double>(plan, tile, skip, grad, x, dx, y, sums);
    case Storage::bfloat16: return backward_type<bfloat16>(plan, tile, skip, grad, x, dx, y, sums);
    case Storage::bfloat16_pairs: return backward_type<bfloat16_pairs>(plan, tile, skip, grad, x, dx, y, sums);
    default: return backward_type<float16>(plan, tile, skip, grad, x, dx, y, sums);
  }
}

// Adds the upper half of the lanes to the lower half until one is left.
template <int Bytes>
GRKAN_INLINE double total(const void* doubles) {
  if constexpr (Bytes == sizeof(double)) {
    double value;
    __builtin_memcpy(&value, doubles, sizeof value);
    return value;
  } else {
    typedef double Half __attribute__((vector_size(Bytes / 2)));
    Half halves[2];
    __builtin_memcpy(halves, doubles, sizeof halves);
    halves[0] += halves[1];
    return total<Bytes / 2>(halves);
  }
}

template <class S>
static void fold_type(const void* vectors, int64_t count, int64_t first, int64_t last, double* to) {
  typedef S Half __attribute__((vector_size(GRKAN_BYTES / 2)));
  Bits<S> lane, inside;
  for (int i = 0; i < lanes<S>; ++i) lane[i] = i;
  inside = (lane >= decltype(lane[0] + 0)(first)) & (lane < decltype(lane[0] + 0)(last));
  for (int64_t k = 0; k < count; ++k) {
    const Bits<S> bits = (Bits<S>)static_cast<const Real<S>*>(vectors)[k] & inside;
    if constexpr (sizeof(S) == 8) {
      to[k] = total<GRKAN_BYTES>(&bits);
    } else {
      Half halves[2];
      __builtin_memcpy(halves, &bits, sizeof halves);
      const Real<double> sums = __builtin_convertvector(halves[0], Real<double>) + __builtin_convertvector(halves[1], Real<double>);
      to[k] = total<GRKAN_BYTES>(&sums);
    }
  }
}

static void fold(Storage type, const void* vectors, int64_t count, int64_t first, int64_t last, double* to) {
  if (type == Storage::float64)
    fold_type<double>(vectors, count, first, last, to);
  else
    fold_type<float>(vectors, count, first, last, to);
}

static const Kernels kernels = {lanes<float>, lanes<double>, forward, backward, fold};

}  // namespace GRKAN_ISA
}  // namespace grkan
