// F and its gradients: the work is cut into tiles, the vector code does it on the caller's threads, and scalars that it
// cannot handle are then computed one by one.

#include "rational.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "grkan.h"
#include "plan.h"

namespace grkan {
namespace {

// The scalars of a tile: enough to make its overhead negligible, few enough for its data to stay in a core's cache.
constexpr int64_t kTile = 32768;

const Kernels& kernels() {
  static const Kernels* chosen = [] {
#if defined(__x86_64__)
    const char* capability = std::getenv("ATEN_CPU_CAPABILITY");  // PyTorch's own variable
    const std::string wanted = capability ? capability : "avx512";
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && wanted == "avx512") return avx512_kernels();
    if (avx2 && wanted != "default") return avx2_kernels();
#endif
    return portable_kernels();
  }();
  return *chosen;
}

// An error that is reported to the caller.
struct Mistake {
  const char* text;
};

template <class T>
struct Aligned {
  explicit Aligned(size_t count) : data(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 64) / 64 * 64))) {
    if (data == nullptr) throw std::bad_alloc();
  }
  Aligned(const Aligned&) = delete;
  ~Aligned() { std::free(data); }
  T* data;
};

// The coefficients of every group, in float64; a shared row is repeated.
struct Coefficients {
  int64_t groups;
  int m, n;
  bool absolute;
  std::vector<double> a, b;

  // The results of a group whose coefficients are not finite need not be accurate.
  bool are_finite(int64_t group) const { return are_finite(a, m + 1, group) && are_finite(b, n, group); }
  bool denominator_is_finite(int64_t group) const { return are_finite(b, n, group); }

  explicit Coefficients(const Call& call)
      : groups(std::max(call.numerator.rows, call.denominator.rows)),
        m(static_cast<int>(call.numerator.columns) - 1),
        n(static_cast<int>(call.denominator.columns)),
        absolute(call.absolute),
        a(read(call.numerator)),
        b(read(call.denominator)) {}

 private:
  std::vector<double> read(const Matrix& t) const {
    const bool wide = t.type == kGrkanFloat64;
    std::vector<double> values(groups * t.columns);
    for (int64_t i = 0; i < t.rows * t.columns; ++i)
      values[i] = wide ? static_cast<const double*>(t.data)[i] : static_cast<const float*>(t.data)[i];
    for (int64_t g = t.rows; g < groups; ++g) std::copy_n(values.begin(), t.columns, values.begin() + g * t.columns);
    return values;
  }

  static bool are_finite(const std::vector<double>& values, int columns, int64_t group) {
    const double* first = values.data() + group * columns;
    return std::all_of(first, first + columns, [](double value) { return std::isfinite(value); });
  }
};

// F and its gradients for one scalar in float64, with the limits at infinity: `reference.py` has the formulas.
struct Scalar {
  const double *a, *b;
  int m, n;
  bool absolute;

  Scalar(const Coefficients& c, int64_t group)
      : Scalar(c.a.data() + group * (c.m + 1), c.b.data() + group * c.n, c.m, c.n, c.absolute) {}
  Scalar(const double* a, const double* b, int m, int n, bool absolute) : a(a), b(b), m(m), n(n), absolute(absolute) {}

  double coefficient(int j) const { return absolute ? std::fabs(b[j]) : b[j]; }

  double numerator(double x) const {
    double p = a[m];
    for (int i = m - 1; i >= 0; --i) p = p * x + a[i];
    return p;
  }

  // Computes A, and its derivative with respect to |x| or x.
  void inner(double t, double& value, double& slope) const {
    value = slope = 0;
    for (int j = n; j >= 1; --j) {
      slope = slope * t + value;
      value = value * t + coefficient(j - 1);
    }
    slope = slope * t + value;
    value *= t;
  }

  // Computes the slope of F at an infinite x if F grows there, or else its limit.
  bool grows(double x, double& limit, double& slope) const {
    int i = m, j = n;
    while (i > 0 && a[i] == 0) --i;
    while (j > 0 && b[j - 1] == 0) --j;
    double ratio = a[i] / (j > 0 ? std::fabs(b[j - 1]) : 1.0);
    if (x < 0 && i % 2 == 1) ratio = -ratio;
    limit = i == j ? ratio : 0.0;
    slope = (x < 0 ? -ratio : ratio) * (i > j + 1 ? std::numeric_limits<double>::infinity() : 1.0);
    return i > j;
  }

  double value(double x) const {
    if (std::isinf(x)) {
      double limit, slope;
      return grows(x, limit, slope) ? slope * x : limit;
    }
    if (n == 0) return m == 0 ? a[0] + 0.0 * x : numerator(x);
    double inside, unused;
    inner(absolute ? std::fabs(x) : x, inside, unused);
    return numerator(x) / (1.0 + std::fabs(inside));
  }

  // Returns dx, and adds to the m + 1 + n sums for da and db; in the form sum_of_abs b stands for |b| there.
  double gradient(double g, double x, double* sums) const {
    if (std::isinf(x)) {
      double limit, slope;
      return grows(x, limit, slope) ? slope * g : 0.0;
    }
    if (std::isnan(g)) {  // a shortcut, so that a diverged training is not slow as well
      std::fill_n(sums, m + 1 + n, g);
      return g;
    }
    const double t = absolute ? std::fabs(x) : x;
    double inside, slope;
    inner(t, inside, slope);
    const double inverse = 1.0 / (1.0 + std::fabs(inside));
    const double v = (inside < 0 ? 1.0 : -1.0) * (numerator(x) * inverse);
    double derivative = 0;
    for (int i = m; i >= 1; --i) derivative = derivative * x + i * a[i];
    if (n > 0) derivative += v * (absolute && x < 0 ? -slope : slope);
    double power = inverse;
    for (int i = 0; i <= m; ++i, power *= x) sums[i] += g * power;
    power = inverse;
    for (int j = 1; j <= n; ++j) sums[m + j] += g * ((power *= t) * v);
    return m == 0 && n == 0 ? 0.0 : g * (inverse * derivative);
  }
};

// Conversions of single scalars, for those that the vector code leaves out.

float to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
struct Native {
  typedef T type;
  static double read(T x) { return x; }
  static T write(double x) { return static_cast<T>(x); }
};

struct BFloat16 : Native<uint16_t> {
  typedef float Arithmetic;
  static double read(uint16_t h) { return to_float(uint32_t(h) << 16); }
  static uint16_t write(double x) {
    const float f = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    if (f != f) return static_cast<uint16_t>((bits | 0x400000) >> 16);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

struct Float16 : Native<uint16_t> {
  typedef float Arithmetic;
  static double read(uint16_t h) {
    const double sign = h & 0x8000 ? -1.0 : 1.0;
    const int exponent = (h >> 10) & 31, fraction = h & 1023;
    if (exponent == 31) return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1024.0 + fraction, exponent - 25) : std::ldexp(fraction, -24));
  }
  static uint16_t write(double x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    x = std::fabs(x);
    if (x != x) return sign | 0x7e00;
    if (x >= 65520.0) return sign | 0x7c00;
    if (x == 0) return sign;
    int exponent;
    std::frexp(x, &exponent);  // x < 2^exponent
    const int unit = std::max(exponent, -13) - 11;
    // A carry out of the fraction gives the next exponent, as it should.
    return sign | static_cast<uint16_t>(((unit + 24) << 10) + std::nearbyint(std::ldexp(x, -unit)));
  }
};

struct Float32 : Native<float> {
  typedef float Arithmetic;
};
struct Float64 : Native<double> {
  typedef double Arithmetic;
};

// Returns the largest |x| up to which no overflow or underflow in S affects F or, if wanted, its derivatives; less than 0 if
// there is no such x.
template <class S>
S limit_of(const Coefficients& c, bool derivatives) {
  typedef std::numeric_limits<S> Limits;
  std::vector<double> a(c.m + 1), b(c.n);  // the largest of all groups
  double least = 1;
  auto gather = [&](const double* from, std::vector<double>& to) {
    for (size_t k = 0; k < to.size(); ++k) {
      const double size = std::fabs(from[k]);
      to[k] = std::max(to[k], size);
      if (size > 0) least = std::min(least, size);
    }
  };
  for (int64_t g = 0; g < c.groups; ++g)
    if (c.are_finite(g)) {
      gather(c.a.data() + g * (c.m + 1), a);
      gather(c.b.data() + g * c.n, b);
    }
  auto power_of_2 = [](int exponent) { return std::ldexp(1.0, exponent); };
  const Scalar bound(a.data(), b.data(), c.m, c.n, true);
  auto fits = [&](double x, int most_p, int most_q, int most_slope) {
    double inside, slope, derivative = 0;
    bound.inner(x, inside, slope);
    for (int i = c.m; i >= 1; --i) derivative = derivative * x + i * a[i];
    const double p = bound.numerator(x);
    return p <= power_of_2(most_p) && 1 + inside <= power_of_2(most_q) && derivative + p * slope <= power_of_2(most_slope);
  };
  // For |x| < 1, F itself may underflow, but not the factors that multiply it.
  constexpr int highest = Limits::max_exponent - 2;
  if (least < power_of_2(Limits::min_exponent + Limits::digits) || !fits(1, Limits::digits, Limits::digits, highest)) return -1;
  int low = 0, high = Limits::max_exponent - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    const bool good = derivatives ? fits(power_of_2(middle), highest, scale<S>, highest)
                                  : fits(power_of_2(middle), highest, highest, Limits::max_exponent);
    (good ? low : high) = good ? middle : middle - 1;
  }
  return static_cast<S>(power_of_2(low));
}

// Returns the smallest |x| for which A keeps its sign in S: b_j x^(j-1) must not underflow, where b_j is the first that is
// not 0. The derivatives need that sign. Subnormal x do not count.
template <class S>
S smallest_of(const Coefficients& c) {
  typedef std::numeric_limits<S> Limits;
  double smallest = 0;
  for (int64_t g = 0; g < c.groups && !c.absolute; ++g) {
    const double* b = c.b.data() + g * c.n;
    const int first = static_cast<int>(std::find_if(b, b + c.n, [](double value) { return value != 0; }) - b);
    if (first == 0 || first == c.n) continue;
    smallest = std::max(smallest, std::pow(Limits::denorm_min() / std::fabs(b[first]), 1.0 / first));
  }
  return smallest > Limits::min() ? static_cast<S>(smallest) : S(0);
}

Storage storage_of(int64_t type) {
  switch (type) {
    case kGrkanFloat32: return Storage::float32;
    case kGrkanFloat64: return Storage::float64;
    case kGrkanFloat16: return Storage::float16;
    default: return Storage::bfloat16;
  }
}

// A plan with the data that it points to, and the tiles.
template <class S>
struct Work {
  Storage storage;
  int64_t groups, width;
  Coefficients coefficients;
  int lanes, unit, sums;
  Plan<S> plan;
  std::vector<Run> runs;
  std::vector<int64_t> groups_of_lanes;  // for each entry, the groups of its lanes
  std::vector<bool> mixed;               // for each entry, whether its groups differ
  std::vector<Tile> tiles;
  std::unique_ptr<Aligned<S>> table;

  Work(const Call& call, bool derivatives)
      : storage(storage_of(call.type)), groups(0), width(call.width), coefficients(call) {
    groups = coefficients.groups;
    const int m = coefficients.m, n = coefficients.n;
    lanes = sizeof(S) == 8 ? kernels().lanes_double : kernels().lanes_float;
    // Both scalars of a pair must belong to one group.
    if (storage == Storage::bfloat16 && width % 2 == 0) storage = Storage::bfloat16_pairs;
    unit = storage == Storage::bfloat16_pairs ? 2 * lanes : lanes;
    sums = m + 1 + n;
    make_runs();
    make_table(derivatives);
    const S smallest = derivatives ? smallest_of<S>(coefficients) : S(0), limit = limit_of<S>(coefficients, derivatives);
    const int64_t size = groups * width;
    plan = Plan<S>{call.scalars / size, size, m, n, call.absolute, smallest, limit, runs.data(), table->data};
    make_tiles();
  }

  // Whether the vector code is right for x.
  bool is_done(double x) const { return is_inside(std::fabs(x), plan); }

  int64_t entries() const { return static_cast<int64_t>(mixed.size()); }

 private:
  void make_runs() {
    const int64_t size = groups * width;
    int64_t last_group = -1;  // the group of the last entry, if it has only one
    for (int64_t at = 0; at < size;) {
      const int64_t group = at / width, end = (group + 1) * width;
      int64_t units = (end - at) / unit, tail = 0;
      const bool shared = units == 0 && end < size;
      if (shared) {  // the unit begins in this group and ends in another
        units = at + unit <= size;
        tail = units ? 0 : size - at;
      } else if (end == size) {
        tail = (end - at) % unit;
      }
      if (shared || group != last_group) add_entry(at, shared);
      last_group = shared ? -1 : group;
      const int64_t most = kVectorsTogether * lanes / unit, pieces = std::max((units + most - 1) / most, int64_t{1});
      for (int64_t piece = pieces; piece > 0; --piece) {
        const int64_t now = units / piece, rest = piece == 1 ? tail : 0;
        runs.push_back({at, now, rest, entries() - 1});
        units -= now;
        at += now * unit + rest;
      }
    }
  }

  void add_entry(int64_t start, bool shared) {
    mixed.push_back(shared);
    const int64_t step = unit / lanes;
    int64_t group = start / width, channel = start;
    for (int lane = 0; lane < lanes; ++lane) {
      while (shared && channel >= (group + 1) * width && group + 1 < groups) ++group;
      groups_of_lanes.push_back(group);
      channel += step;
    }
  }

  void make_table(bool derivatives) {
    const int m = coefficients.m, n = coefficients.n, columns = sums + (derivatives ? m + n : 0);
    std::vector<S> rows(groups * columns);  // the content of an entry, for each group
    for (int64_t g = 0; g < groups; ++g) {
      S* to = &rows[g * columns];
      auto put = [&](double c, int factor) {
        // Replace any NaN by one fixed NaN, see `round_to_bfloat16`; + 0.0 makes a zero +0, whose sign A takes on.
        *to++ = static_cast<S>(c == c ? factor * c + 0.0 : std::numeric_limits<double>::quiet_NaN());
      };
      const Scalar scalar(coefficients, g);
      for (int i = 0; i <= m; ++i) put(scalar.a[i], 1);
      for (int j = 1; j <= n; ++j) put(scalar.coefficient(j - 1), 1);
      if (!derivatives) continue;
      for (int i = 1; i <= m; ++i) put(scalar.a[i], i);
      for (int j = 1; j <= n; ++j) put(scalar.coefficient(j - 1), j);
    }
    table = std::make_unique<Aligned<S>>(entries() * columns * lanes);
    S* to = table->data;
    for (int64_t entry = 0; entry < entries(); ++entry, to += columns * lanes) {
      const int64_t* group = &groups_of_lanes[entry * lanes];
      for (int lane = 0, end = 0; lane < lanes; lane = end) {  // lanes of one group
        end = mixed[entry] ? lane + 1 : lanes;
        while (end < lanes && group[end] == group[lane]) ++end;
        const S* from = &rows[group[lane] * columns];
        for (int k = 0; k < columns; ++k) std::fill_n(to + k * lanes + lane, end - lane, from[k]);
      }
    }
  }

  // Makes tiles from the shape alone, so that sums over tiles do not depend on the number of threads.
  void make_tiles() {
    const int64_t size = plan.row_size, rows = plan.rows, count = static_cast<int64_t>(runs.size());
    // No entry may have more vectors in a tile than may be summed in S.
    const int64_t most = kVectorsTogether * kSumsOfThem;
    int64_t vectors = 0;  // of a row, for the entry that has the most
    for (int64_t k = 0, of_entry = 0; k < count; ++k) {
      of_entry = (k > 0 && runs[k].entry == runs[k - 1].entry ? of_entry : 0) + vectors_of(runs[k]);
      vectors = std::max(vectors, of_entry);
    }
    // With many groups a tile must be larger, so that there is enough to sum for each.
    const int64_t target = std::max(kTile, 4 * groups * sums);
    if (size <= target && vectors <= most) {
      int64_t number = (rows * size + target - 1) / target, least = (rows * vectors + most - 1) / most;
      if (std::max(number, least) > 2) {  // two or four threads get the same
        number = (number + 1) / 4 * 4;
        least = (least + 3) / 4 * 4;
      }
      number = std::max(number, least);
      number = std::min(number, rows);
      for (int64_t t = 0; t < number; ++t) tiles.push_back({rows * t / number, rows * (t + 1) / number, 0, count});
      return;
    }
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t first = 0, last = 0; first < count; first = last) {
        for (int64_t total = vectors_of(runs[last++]); last < count && (total += vectors_of(runs[last])) <= most;) ++last;
        tiles.push_back({row, row + 1, first, last});
      }
  }

  int64_t vectors_of(const Run& run) const { return (run.units + (run.tail > 0)) * (unit / lanes); }
};

// Calls f(index, group) for every scalar of a tile.
template <class S, class F>
void for_each_scalar(const Work<S>& work, const Tile& tile, const F& f) {
  const Run &first = work.runs[tile.first_run], &last = work.runs[tile.last_run - 1];
  const int64_t end = last.offset + last.units * work.unit + last.tail;
  for (int64_t row = tile.first_row; row < tile.last_row; ++row)
    for (int64_t i = first.offset; i < end; ++i) f(row * work.plan.row_size + i, i / work.width);
}

// Adds the sums of a tile's entries, which lie one after the other, to the sums of their groups, always in the same order.
// Returns false if a sum is not finite although the coefficients of its group are.
template <class S>
bool fold_entries(const Work<S>& work, int64_t first, int64_t last, const S* vectors, double* to) {
  const double unscale = work.coefficients.n > 0 ? std::ldexp(1.0, -scale<S>) : 1.0;
  std::vector<double> sums(work.sums);
  for (int64_t entry = first; entry <= last; ++entry) {
    const int64_t* group = &work.groups_of_lanes[entry * work.lanes];
    const S* from = vectors + (entry + 1) * work.sums * work.lanes;
    for (int64_t lane = 0, end = 0; lane < work.lanes; lane = end) {  // lanes of one group
      end = work.mixed[entry] ? std::upper_bound(group + lane, group + work.lanes, group[lane]) - group : work.lanes;
      kernels().fold(work.storage, from, work.sums, lane, end, sums.data());
      for (int k = 0; k < work.sums; ++k) to[group[lane] * work.sums + k] += sums[k] * unscale;
    }
  }
  for (int64_t g = work.groups_of_lanes[first * work.lanes]; g <= work.groups_of_lanes[(last + 1) * work.lanes - 1]; ++g)
    if (!std::all_of(to + g * work.sums, to + (g + 1) * work.sums, [](double sum) { return std::isfinite(sum); }) &&
        work.coefficients.are_finite(g))
      return false;
  return true;
}

// Calls f(from, to) for pieces that together are [0, count).
template <class F>
void parallel_for(const Threads& threads, int64_t count, const F& f) {
  struct Data {
    const F& f;
    std::atomic<bool> failed;
  } data{f, false};
  // The library that owns the threads may not handle C++ exceptions.
  auto body = [](int64_t from, int64_t to, void* data_) {
    Data& data = *static_cast<Data*>(data_);
    try {
      data.f(from, to);
    } catch (const std::bad_alloc&) {
      data.failed = true;
    }
  };
  if (count == 1 || threads.run == nullptr)
    body(0, count, &data);
  else if (!threads.run(threads.pool, count, body, &data))
    throw Mistake{"the threads that were to do the work did not"};
  if (data.failed) throw std::bad_alloc();
}

template <class T>
void run_forward(const Work<typename T::Arithmetic>& work, const Threads& threads, const void* x_, void* y_) {
  const auto* x = static_cast<const typename T::type*>(x_);
  auto* y = static_cast<typename T::type*>(y_);
  parallel_for(threads, work.tiles.size(), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (kernels().forward(work.storage, &work.plan, work.tiles[t], x, y)) continue;
      for_each_scalar(work, work.tiles[t], [&](int64_t i, int64_t group) {
        const double z = T::read(x[i]);
        if (!work.is_done(z)) y[i] = T::write(Scalar(work.coefficients, group).value(z));
      });
    }
  });
}

// Runs the backward, and returns the sums of every group, [groups, m + 1 + n].
template <class T>
std::vector<double> run_backward(
    const Work<typename T::Arithmetic>& work, const Threads& threads, const void* grad_, const void* x_, void* dx_,
    void* y_) {
  typedef typename T::Arithmetic S;
  const auto* grad = static_cast<const typename T::type*>(grad_);
  const auto* x = static_cast<const typename T::type*>(x_);
  auto* dx = static_cast<typename T::type*>(dx_);
  auto* y = static_cast<typename T::type*>(y_);
  const int64_t all = work.groups * work.sums, tiles = static_cast<int64_t>(work.tiles.size());
  const int64_t vectors_of_entry = work.sums * work.lanes;
  Aligned<double> partial(tiles * all);
  parallel_for(threads, tiles, [&](int64_t begin, int64_t end) {
    Aligned<S> vectors((work.entries() + 1) * vectors_of_entry);
    for (int64_t t = begin; t < end; ++t) {
      const Tile& tile = work.tiles[t];
      const int64_t first = work.runs[tile.first_run].entry, last = work.runs[tile.last_run - 1].entry;
      double* to = partial.data + t * all;
      std::fill_n(to, all, 0.0);
      auto vector_code = [&](bool skip) {
        std::fill(vectors.data + (first + 1) * vectors_of_entry, vectors.data + (last + 2) * vectors_of_entry, S(0));
        return kernels().backward(work.storage, &work.plan, tile, skip, grad, x, dx, y, vectors.data);
      };
      const bool done = vector_code(false) || (vector_code(true), false);
      // Sums overflow in S long before they do in double.
      const bool summed = fold_entries(work, first, last, vectors.data, to);
      if (done && summed) continue;
      if (!summed) std::fill_n(to, all, 0.0);
      for_each_scalar(work, tile, [&](int64_t i, int64_t group) {
        const double z = T::read(x[i]);
        const bool is_done = work.is_done(z);
        if (is_done && summed) return;
        const Scalar scalar(work.coefficients, group);
        const double gradient = scalar.gradient(T::read(grad[i]), z, to + group * work.sums);
        if (is_done) return;
        dx[i] = T::write(gradient);
        if (y) y[i] = T::write(scalar.value(z));
      });
    }
  });
  std::vector<double> total(all, 0.0);
  for (int64_t t = 0; t < tiles; ++t)
    for (int64_t i = 0; i < all; ++i) total[i] += partial.data[t * all + i];
  for (int64_t g = 0; g < work.groups; ++g)  // because the vector code assumes that 1 / Q is a normal number
    if (!work.coefficients.denominator_is_finite(g))
      std::fill_n(&total[g * work.sums], work.sums, std::numeric_limits<double>::quiet_NaN());
  return total;
}

void require(bool condition, const char* text) {
  if (!condition) throw Mistake{text};
}

// Checks types and sizes, so that a wrong call does not read memory beyond its arguments.
void check(const Call& call) {
  const auto& [type, scalars, width, absolute, a, b] = call;
  require(type >= kGrkanFloat32 && type <= kGrkanBFloat16, "x must be float16, bfloat16, float32 or float64");
  for (const Matrix* matrix : {&a, &b})
    require(matrix->type == kGrkanFloat32 || matrix->type == kGrkanFloat64, "coefficients must be float32 or float64");
  const int64_t groups = std::max(a.rows, b.rows);
  require(a.rows > 0 && b.rows > 0, "coefficients must have a row");
  require(std::min(a.rows, b.rows) == 1 || a.rows == b.rows, "coefficients must have the same number of rows, or one");
  require(a.columns > 0, "numerator must have a column");
  require(b.columns >= 0, "denominator must not have fewer columns than none");
  require(
      scalars == 0 || (width > 0 && width <= scalars / groups && scalars % (groups * width) == 0),
      "x must have a multiple of groups * width scalars");
  require(a.data && (b.data || b.columns == 0), "there is no memory at an address of coefficients");
}

// Checks the addresses of tensors like x.
void check_memory(const Call& call, std::initializer_list<const void*> addresses) {
  for (const void* address : addresses) require(address || call.scalars == 0, "there is no memory at an address");
}

template <class F>
void with_type(int64_t type, const F& f) {
  switch (type) {
    case kGrkanFloat32: return f(Float32());
    case kGrkanFloat64: return f(Float64());
    case kGrkanFloat16: return f(Float16());
    default: return f(BFloat16());
  }
}

// Writes columns of the sums, from `first` on, as the gradient of coefficients; a shared row gets the sum over all groups.
template <class C>
void gather(const std::vector<double>& sums, int64_t columns, int64_t first, const Matrix& like, bool absolute, void* to) {
  const int64_t groups = static_cast<int64_t>(sums.size()) / columns;
  const C* coefficients = static_cast<const C*>(like.data);
  for (int64_t row = 0; row < like.rows; ++row)
    for (int64_t k = 0; k < like.columns; ++k) {
      double sum = 0;
      for (int64_t g = row; g < (like.rows == 1 ? groups : row + 1); ++g) sum += sums[g * columns + first + k];
      const int64_t i = row * like.columns + k;
      static_cast<C*>(to)[i] = static_cast<C>(absolute && coefficients[i] < 0 ? -sum : sum);  // d|b| = sign(b) db
    }
}

void write_gradient(
    const std::vector<double>& sums, int64_t columns, int64_t first, const Matrix& like, bool absolute, void* to) {
  if (like.type == kGrkanFloat64)
    gather<double>(sums, columns, first, like, absolute, to);
  else
    gather<float>(sums, columns, first, like, absolute, to);
}

template <class F>
const char* with_mistakes_told(const F& f) {
  try {
    f();
    return nullptr;
  } catch (const Mistake& mistake) {
    return mistake.text;
  } catch (const std::bad_alloc&) {
    return "out of memory";
  }
}

}  // namespace

const char* forward(const Call& call, const Threads& threads, const void* x, void* y) {
  return with_mistakes_told([&] {
    check(call);
    check_memory(call, {x, y});
    if (call.scalars == 0) return;
    with_type(call.type, [&](auto type) {
      typedef decltype(type) T;
      run_forward<T>(Work<typename T::Arithmetic>(call, false), threads, x, y);
    });
  });
}

const char* backward(
    const Call& call, const Threads& threads, const void* grad, const void* x, void* dx, void* da, void* db, void* y) {
  return with_mistakes_told([&] {
    check(call);
    check_memory(call, {grad, x, dx});
    const Matrix &a = call.numerator, &b = call.denominator;
    require(da && (db || b.columns == 0), "there is no memory for the gradients of coefficients");
    const int64_t columns = a.columns + b.columns;
    std::vector<double> sums(std::max(a.rows, b.rows) * columns, 0.0);
    if (call.scalars > 0)
      with_type(call.type, [&](auto type) {
        typedef decltype(type) T;
        sums = run_backward<T>(Work<typename T::Arithmetic>(call, true), threads, grad, x, dx, y);
      });
    write_gradient(sums, columns, 0, a, false, da);
    write_gradient(sums, columns, a.columns, b, call.absolute, db);
  });
}

}  // namespace grkan
