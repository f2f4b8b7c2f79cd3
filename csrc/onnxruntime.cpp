// The operator for ONNX Runtime: the node `GroupRational` of the domain "grkan", with an attribute `form`, "abs_of_sum" or
// "sum_of_abs", an attribute `channel_dim`, and the inputs x, of float32 or float16, and numerator and denominator, of
// float32. The function `grkan.onnx_library` says how to register it.
//
// ONNX Runtime hands a table of functions to a library of operators, and promises that each function keeps its position in
// every later version. This file declares the functions that it uses; tests/export/test_library.py tests them.

#include <algorithm>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "grkan.h"
#include "rational.h"

namespace {

constexpr uint32_t kVersion = 18;  // ONNX Runtime 1.18, the oldest with all the functions and fields used below

struct Status;   // of a call: nullptr if it succeeded
struct Options;  // of a session
struct Domain;   // a set of operators
struct Info;     // about a node, when its kernel is made
struct Context;  // of one computation
struct ShapeContext;
struct Value;  // a tensor
struct Shape;  // its type and shape

struct Api {
  void* functions[275];  // up to the last one used
};

struct ApiBase {
  const Api* (*get)(uint32_t version);
  const char* (*version)();
};

// A function of the table: its type, and its position.
template <class F, int Position>
struct Function {
  template <class... Arguments>
  static auto call(const Api* api, Arguments... arguments) {
    return reinterpret_cast<F*>(api->functions[Position])(arguments...);
  }
};
typedef Function<Status*(int code, const char* message), 0> CreateStatus;
typedef Function<Status*(const char* name, Domain**), 26> CreateDomain;
typedef Function<Status*(Domain*, const void* operator_), 27> AddToDomain;
typedef Function<Status*(Options*, Domain*), 28> AddDomain;
typedef Function<Status*(Value*, void** data), 51> GetData;
typedef Function<Status*(const Shape*, size_t* count), 61> GetDimensionsCount;
typedef Function<Status*(const Shape*, int64_t* sizes, size_t count), 62> GetDimensions;
typedef Function<Status*(const Value*, Shape**), 65> GetShape;
typedef Function<Status*(const Info*, const char* name, int64_t*), 86> GetInteger;
typedef Function<Status*(const Info*, const char* name, char* text, size_t* size), 87> GetString;
typedef Function<Status*(const Context*, size_t index, const Value**), 90> GetInput;
typedef Function<Status*(Context*, size_t index, const int64_t* sizes, size_t count, Value**), 91> GetOutput;
typedef Function<void(Shape*), 99> ReleaseShape;
typedef Function<Status*(const ShapeContext*, size_t index, Shape**), 268> GetInputShape;
typedef Function<Status*(const ShapeContext*, size_t index, const Shape*), 270> SetOutputShape;
typedef Function<Status*(const Context*, void (*)(void* data, size_t index), size_t count, size_t batches, void* data), 274>
    ParallelFor;

constexpr int kFail = 1, kInvalidArgument = 2;  // codes of a status
constexpr int kFloat = 1, kFloat16 = 10;        // types of tensors

// What ONNX Runtime needs to know about an operator.
struct Operator {
  uint32_t version;
  void* (*create_kernel)(const Operator*, const Api*, const Info*);  // replaced by create_kernel_2
  const char* (*name)(const Operator*);
  const char* (*execution_provider)(const Operator*);
  int (*input_type)(const Operator*, size_t index);
  size_t (*input_count)(const Operator*);
  int (*output_type)(const Operator*, size_t index);
  size_t (*output_count)(const Operator*);
  void (*compute)(void* kernel, Context*);  // replaced by compute_2
  void (*destroy_kernel)(void* kernel);
  int (*input_characteristic)(const Operator*, size_t index);
  int (*output_characteristic)(const Operator*, size_t index);
  int (*input_memory)(const Operator*, size_t index);
  int (*variadic_input_least)(const Operator*);
  int (*variadic_input_homogeneous)(const Operator*);
  int (*variadic_output_least)(const Operator*);
  int (*variadic_output_homogeneous)(const Operator*);
  Status* (*create_kernel_2)(const Operator*, const Api*, const Info*, void** kernel);
  Status* (*compute_2)(void* kernel, Context*);
  Status* (*infer_output_shape)(const Operator*, ShapeContext*);
  int (*first_version)(const Operator*);
  int (*last_version)(const Operator*);
  // About buffers that may be shared. None may here: F reads x again where a vector held a large x.
  size_t (*may_inplace)(int**, int**);
  void (*release_may_inplace)(int*, int*);
  size_t (*aliases)(int**, int**);
  void (*release_aliases)(int*, int*);
};

// ONNX Runtime sees only its beginning.
struct GroupRational : Operator {
  const Api* api;
  int type;  // of x and y
};

struct Failure {
  Status* status;
};

void check(Status* status) {
  if (status != nullptr) throw Failure{status};
}

void require(const Api* api, bool condition, const std::string& message) {
  if (!condition) throw Failure{CreateStatus::call(api, kInvalidArgument, message.c_str())};
}

// No exception may leave the library.
template <class F>
Status* guarded(const Api* api, const F& f) {
  try {
    f();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::bad_alloc&) {
    return CreateStatus::call(api, kFail, "grkan: out of memory");
  }
}

struct Tensor {
  void* data;
  std::vector<int64_t> sizes;

  Tensor(const Api* api, const Context* context, size_t index) {
    const Value* value;
    check(GetInput::call(api, context, index, &value));
    check(GetData::call(api, const_cast<Value*>(value), &data));
    Shape* shape;
    check(GetShape::call(api, value, &shape));
    size_t count = 0;
    Status* status = GetDimensionsCount::call(api, shape, &count);
    if (status == nullptr) {
      sizes.resize(count);
      status = GetDimensions::call(api, shape, sizes.data(), count);
    }
    ReleaseShape::call(api, shape);
    check(status);
  }

  grkan::Matrix matrix(const Api* api, const char* name) const {
    require(api, sizes.size() == 2, std::string("grkan: ") + name + " must have two dimensions");
    return {data, kGrkanFloat32, sizes[0], sizes[1]};
  }
};

// Adapts ONNX Runtime's threads to rational.h.
struct Pool {
  const Api* api;
  const Context* context;

  grkan::Threads threads() const { return {run, this}; }

  static bool run(const void* self, int64_t count, grkan::Threads::Body body, void* data) {
    struct Work {
      grkan::Threads::Body body;
      void* data;
    } work = {body, data};
    const auto one = [](void* data, size_t index) {
      const Work* work = static_cast<Work*>(data);
      work->body(index, index + 1, work->data);
    };
    const Pool* pool = static_cast<const Pool*>(self);
    return ParallelFor::call(pool->api, pool->context, +one, size_t(count), size_t(0), static_cast<void*>(&work)) == nullptr;
  }
};

// A node.
struct Kernel {
  const Api* api;
  int type;
  bool absolute;
  int64_t channel_dim;

  Kernel(const GroupRational& of, const Api* api, const Info* info) : api(api), type(of.type) {
    size_t size = 0;
    check(GetString::call(api, info, "form", nullptr, &size));
    std::string form(size, '\0');
    check(GetString::call(api, info, "form", form.data(), &size));
    form.resize(std::strlen(form.c_str()));  // the size includes the final zero
    require(
        api, form == "abs_of_sum" || form == "sum_of_abs",
        "grkan: form must be \"abs_of_sum\" or \"sum_of_abs\"; got \"" + form + "\"");
    absolute = form == "sum_of_abs";
    check(GetInteger::call(api, info, "channel_dim", &channel_dim));
  }

  void compute(Context* context) const {
    const Tensor x(api, context, 0), a(api, context, 1), b(api, context, 2);
    const int64_t dims = static_cast<int64_t>(x.sizes.size()), dim = channel_dim < 0 ? channel_dim + dims : channel_dim;
    require(api, 0 <= dim && dim < dims, "grkan: x has no dimension " + std::to_string(channel_dim));
    grkan::Call call = {};
    call.type = type == kFloat16 ? kGrkanFloat16 : kGrkanFloat32;
    call.absolute = absolute;
    call.numerator = a.matrix(api, "numerator");
    call.denominator = b.matrix(api, "denominator");
    const int64_t groups = std::max({call.numerator.rows, call.denominator.rows, int64_t{1}}), channels = x.sizes[dim];
    require(
        api, channels % groups == 0,
        "grkan: the channels of x must be divisible by the number of groups, " + std::to_string(groups) + "; got " +
            std::to_string(channels));
    call.scalars = 1;
    for (int64_t size : x.sizes) call.scalars *= size;
    call.width = channels / groups;
    for (int64_t d = dim + 1; d < dims; ++d) call.width *= x.sizes[d];

    Value* output;
    void* y;
    check(GetOutput::call(api, context, size_t(0), x.sizes.data(), x.sizes.size(), &output));
    check(GetData::call(api, output, &y));
    const Pool pool = {api, context};
    const char* problem = grkan::forward(call, pool.threads(), x.data, y);
    require(api, problem == nullptr, std::string("grkan: ") + (problem ? problem : ""));
  }
};

GroupRational describe(const Api* api, int type) {
  const auto one = [](const Operator*) { return 1; };
  const auto zero = [](const Operator*, size_t) { return 0; };  // 0: required, and in the memory of the CPU
  GroupRational it = {};
  it.api = api;
  it.type = type;
  it.version = kVersion;
  it.name = [](const Operator*) { return "GroupRational"; };
  it.execution_provider = [](const Operator*) -> const char* { return nullptr; };  // the CPU's
  it.input_type = [](const Operator* self, size_t index) {
    return index == 0 ? static_cast<const GroupRational*>(self)->type : kFloat;
  };
  it.input_count = [](const Operator*) -> size_t { return 3; };
  it.output_type = [](const Operator* self, size_t) { return static_cast<const GroupRational*>(self)->type; };
  it.output_count = [](const Operator*) -> size_t { return 1; };
  it.input_characteristic = it.output_characteristic = it.input_memory = zero;
  it.variadic_input_least = it.variadic_input_homogeneous = one;
  it.variadic_output_least = it.variadic_output_homogeneous = one;
  it.create_kernel_2 = [](const Operator* self, const Api* api, const Info* info, void** kernel) {
    return guarded(api, [&] { *kernel = new Kernel(*static_cast<const GroupRational*>(self), api, info); });
  };
  it.destroy_kernel = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  it.compute_2 = [](void* kernel, Context* context) {
    const Kernel* self = static_cast<Kernel*>(kernel);
    return guarded(self->api, [&] { self->compute(context); });
  };
  // Without it ONNX Runtime would not know the output shape of a node, and would fuse less after it.
  it.infer_output_shape = [](const Operator* self, ShapeContext* context) {
    const Api* api = static_cast<const GroupRational*>(self)->api;
    return guarded(api, [&] {
      Shape* shape;
      check(GetInputShape::call(api, context, size_t(0), &shape));
      check(SetOutputShape::call(api, context, size_t(0), shape));
    });
  };
  it.first_version = it.last_version = one;
  return it;
}

// What a session needs for its whole life. The library is not told when a session ends, so this is never freed.
struct Registration {
  GroupRational operators[2];
  Domain* domain;
};

}  // namespace

// ONNX Runtime looks for a function of this name.
GRKAN_EXPORT Status* RegisterCustomOps(Options* options, const ApiBase* base) {
  const Api* api = base->get(kVersion);
  if (api == nullptr) {
    const std::string version = base->version();
    return CreateStatus::call(
        base->get(1), kFail, ("grkan's library needs ONNX Runtime 1.18 or newer; this is " + version).c_str());
  }
  return guarded(api, [&] {
    auto* registration = new Registration{{describe(api, kFloat), describe(api, kFloat16)}, nullptr};
    check(CreateDomain::call(api, "grkan", &registration->domain));
    for (const GroupRational& it : registration->operators)
      check(AddToDomain::call(api, registration->domain, static_cast<const void*>(&it)));
    check(AddDomain::call(api, options, registration->domain));
  });
}
