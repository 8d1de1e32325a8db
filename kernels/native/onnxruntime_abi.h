// The part of ONNX Runtime's C interface that these operators use, declared here because its Python
// packages come without headers. The interface is a table of functions that is only ever appended
// to (https://onnxruntime.ai/docs/reference/compatibility.html), so a function is known by its
// position; tests/test_kernels.py runs all of them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorInfo;
using Api = void* const;  // the table; `const Api*` is its first entry

struct ApiBase {
  const Api* (*get_api)(std::uint32_t version);
  const char* (*get_version)();
};

constexpr std::uint32_t kApiVersion = 17;      // ONNX Runtime 1.17, the first with parallel_for
constexpr std::uint32_t kOperatorVersion = 16;  // of the layout of CustomOp below

enum ElementType { kFloat = 1, kUint8 = 2, kInt64 = 7, kBool = 9, kFloat16 = 10, kBFloat16 = 16 };
enum Presence { kRequired = 0, kOptional = 1 };
enum ErrorCode { kFail = 1, kInvalidArgument = 2 };

struct CustomOp {
  std::uint32_t version;
  void* (*create_kernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  ElementType (*input_type)(const CustomOp*, std::size_t);
  std::size_t (*input_count)(const CustomOp*);
  ElementType (*output_type)(const CustomOp*, std::size_t);
  std::size_t (*output_count)(const CustomOp*);
  void (*compute)(void*, KernelContext*);
  void (*destroy)(void*);
  Presence (*input_presence)(const CustomOp*, std::size_t);
  Presence (*output_presence)(const CustomOp*, std::size_t);
  int (*input_memory)(const CustomOp*, std::size_t);
  int (*variadic_input_minimum)(const CustomOp*);
  int (*variadic_input_alike)(const CustomOp*);
  int (*variadic_output_minimum)(const CustomOp*);
  int (*variadic_output_alike)(const CustomOp*);
  Status* (*create_kernel_with_status)(const CustomOp*, const Api*, const KernelInfo*, void**);
  Status* (*compute_with_status)(void*, KernelContext*);
};

// Calls by position in the table.
class Interface {
 public:
  explicit Interface(const Api* table) : table_(table) {}

  Status* create_status(ErrorCode code, const char* message) const {
    return at<Status* (*)(ErrorCode, const char*)>(0)(code, message);
  }
  Status* create_domain(const char* name, CustomOpDomain** out) const {
    return at<Status* (*)(const char*, CustomOpDomain**)>(26)(name, out);
  }
  Status* add_operator(CustomOpDomain* domain, const CustomOp* op) const {
    return at<Status* (*)(CustomOpDomain*, const CustomOp*)>(27)(domain, op);
  }
  Status* add_domain(SessionOptions* options, CustomOpDomain* domain) const {
    return at<Status* (*)(SessionOptions*, CustomOpDomain*)>(28)(options, domain);
  }
  Status* tensor_data(const Value* value, void** out) const {
    return at<Status* (*)(const Value*, void**)>(51)(value, out);
  }
  Status* dimension_count(const TensorInfo* info, std::size_t* out) const {
    return at<Status* (*)(const TensorInfo*, std::size_t*)>(61)(info, out);
  }
  Status* dimensions(const TensorInfo* info, std::int64_t* out, std::size_t count) const {
    return at<Status* (*)(const TensorInfo*, std::int64_t*, std::size_t)>(62)(info, out, count);
  }
  Status* tensor_info(const Value* value, TensorInfo** out) const {
    return at<Status* (*)(const Value*, TensorInfo**)>(65)(value, out);
  }
  Status* float_attribute(const KernelInfo* info, const char* name, float* out) const {
    return at<Status* (*)(const KernelInfo*, const char*, float*)>(85)(info, name, out);
  }
  Status* integer_attribute(const KernelInfo* info, const char* name, std::int64_t* out) const {
    return at<Status* (*)(const KernelInfo*, const char*, std::int64_t*)>(86)(info, name, out);
  }
  Status* input_count(const KernelContext* context, std::size_t* out) const {
    return at<Status* (*)(const KernelContext*, std::size_t*)>(88)(context, out);
  }
  Status* output_count(const KernelContext* context, std::size_t* out) const {
    return at<Status* (*)(const KernelContext*, std::size_t*)>(89)(context, out);
  }
  Status* input(const KernelContext* context, std::size_t index, const Value** out) const {
    return at<Status* (*)(const KernelContext*, std::size_t, const Value**)>(90)(context, index,
                                                                                 out);
  }
  Status* output(KernelContext* context, std::size_t index, const std::int64_t* dimensions,
                 std::size_t count, Value** out) const {
    return at<Status* (*)(KernelContext*, std::size_t, const std::int64_t*, std::size_t, Value**)>(
        91)(context, index, dimensions, count, out);
  }
  void release_status(Status* status) const { at<void (*)(Status*)>(93)(status); }
  void release_tensor_info(TensorInfo* info) const { at<void (*)(TensorInfo*)>(99)(info); }
  Status* parallel_for(const KernelContext* context, void (*body)(void*, std::size_t),
                       std::size_t total, std::size_t batches, void* data) const {
    return at<Status* (*)(const KernelContext*, void (*)(void*, std::size_t), std::size_t,
                          std::size_t, void*)>(274)(context, body, total, batches, data);
  }

 private:
  template <typename Function>
  Function at(std::size_t position) const {
    return reinterpret_cast<Function>(table_[position]);
  }
  const Api* table_;
};

}  // namespace ort
