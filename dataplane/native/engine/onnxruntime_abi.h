// The part of ONNX Runtime's C interface that the engine uses, declared here because its Python
// packages come without headers. The interface is a table of functions that is only ever appended
// to (https://onnxruntime.ai/docs/reference/compatibility.html), so a function is known by its
// position. Status functions return nullptr for success; else what must be released.
#pragma once

#include <cstddef>
#include <cstdint>

namespace attnserve::engine::ort {

struct Status;
struct Env;
struct SessionOptions;
struct Session;
struct RunOptions;
struct Value;
struct TypeInfo;
struct TensorInfo;
struct MemoryInfo;
struct Allocator;
struct CudaOptions;
using Table = void* const;  // the functions; `const Table*` is the first of them

struct ApiBase {
  const Table* (*get_api)(std::uint32_t version);
  const char* (*get_version)();
};

constexpr std::uint32_t kApiVersion = 17;  // ONNX Runtime 1.17, which our operators need too

enum ElementType : int {
  kFloat = 1,
  kUint8 = 2,
  kInt32 = 6,
  kInt64 = 7,
  kBool = 9,
  kFloat16 = 10,
  kBFloat16 = 16
};
enum Severity : int { kFatal = 4 };
enum ExecutionMode : int { kSequential = 0 };
enum AllocatorType : int { kDeviceAllocator = 0, kArenaAllocator = 1 };
enum MemoryType : int { kCpuOutput = -1, kDefaultMemory = 0 };

// An allocator of ours, as ONNX Runtime calls it; its layout up to what version 17 has.
struct HostAllocator {
  std::uint32_t version;
  void* (*allocate)(HostAllocator*, std::size_t);
  void (*free)(HostAllocator*, void*);
  const MemoryInfo* (*info)(const HostAllocator*);
};

// Calls by position in the table.
class Interface {
 public:
  explicit Interface(const Table* table) : table_(table) {}

  const char* error_message(const Status* status) const {
    return at<const char* (*)(const Status*)>(2)(status);
  }
  Status* create_env(Severity severity, const char* name, Env** out) const {
    return at<Status* (*)(Severity, const char*, Env**)>(3)(severity, name, out);
  }
  Status* disable_telemetry(const Env* env) const { return at<Status* (*)(const Env*)>(6)(env); }

  Status* create_session(const Env* env, const char* path, const SessionOptions* options,
                         Session** out) const {
    return at<Status* (*)(const Env*, const char*, const SessionOptions*, Session**)>(7)(
        env, path, options, out);
  }
  Status* create_session(const Env* env, const void* model, std::size_t size,
                         const SessionOptions* options, Session** out) const {
    return at<Status* (*)(const Env*, const void*, std::size_t, const SessionOptions*, Session**)>(
        8)(env, model, size, options, out);
  }
  // Values in `outputs` that are not null are where a run puts its results; the others it makes.
  Status* run(Session* session, const RunOptions* options, const char* const* input_names,
              const Value* const* inputs, std::size_t input_count, const char* const* output_names,
              std::size_t output_count, Value** outputs) const {
    return at<Status* (*)(Session*, const RunOptions*, const char* const*, const Value* const*,
                          std::size_t, const char* const*, std::size_t, Value**)>(9)(
        session, options, input_names, inputs, input_count, output_names, output_count, outputs);
  }

  Status* create_session_options(SessionOptions** out) const {
    return at<Status* (*)(SessionOptions**)>(10)(out);
  }
  Status* set_execution_mode(SessionOptions* options, ExecutionMode mode) const {
    return at<Status* (*)(SessionOptions*, ExecutionMode)>(13)(options, mode);
  }
  Status* disable_memory_pattern(SessionOptions* options) const {
    return at<Status* (*)(SessionOptions*)>(17)(options);
  }
  Status* disable_cpu_arena(SessionOptions* options) const {
    return at<Status* (*)(SessionOptions*)>(19)(options);
  }
  Status* set_severity(SessionOptions* options, Severity severity) const {
    return at<Status* (*)(SessionOptions*, int)>(22)(options, severity);
  }
  Status* set_intra_op_threads(SessionOptions* options, int count) const {
    return at<Status* (*)(SessionOptions*, int)>(24)(options, count);
  }
  Status* set_inter_op_threads(SessionOptions* options, int count) const {
    return at<Status* (*)(SessionOptions*, int)>(25)(options, count);
  }
  Status* add_config_entry(SessionOptions* options, const char* key, const char* value) const {
    return at<Status* (*)(SessionOptions*, const char*, const char*)>(130)(options, key, value);
  }

  Status* input_count(const Session* session, std::size_t* out) const {
    return at<Status* (*)(const Session*, std::size_t*)>(30)(session, out);
  }
  Status* output_count(const Session* session, std::size_t* out) const {
    return at<Status* (*)(const Session*, std::size_t*)>(31)(session, out);
  }
  // Of inputs that may be left out: they have values of their own.
  Status* optional_input_count(const Session* session, std::size_t* out) const {
    return at<Status* (*)(const Session*, std::size_t*)>(32)(session, out);
  }
  Status* optional_input_type(const Session* session, std::size_t index, TypeInfo** out) const {
    return at<Status* (*)(const Session*, std::size_t, TypeInfo**)>(35)(session, index, out);
  }
  Status* optional_input_name(const Session* session, std::size_t index, Allocator* allocator,
                              char** out) const {
    return at<Status* (*)(const Session*, std::size_t, Allocator*, char**)>(38)(session, index,
                                                                                allocator, out);
  }
  Status* input_type(const Session* session, std::size_t index, TypeInfo** out) const {
    return at<Status* (*)(const Session*, std::size_t, TypeInfo**)>(33)(session, index, out);
  }
  Status* output_type(const Session* session, std::size_t index, TypeInfo** out) const {
    return at<Status* (*)(const Session*, std::size_t, TypeInfo**)>(34)(session, index, out);
  }
  // The name is to be released through the allocator.
  Status* input_name(const Session* session, std::size_t index, Allocator* allocator,
                     char** out) const {
    return at<Status* (*)(const Session*, std::size_t, Allocator*, char**)>(36)(session, index,
                                                                                allocator, out);
  }
  Status* output_name(const Session* session, std::size_t index, Allocator* allocator,
                      char** out) const {
    return at<Status* (*)(const Session*, std::size_t, Allocator*, char**)>(37)(session, index,
                                                                                allocator, out);
  }

  Status* create_run_options(RunOptions** out) const {
    return at<Status* (*)(RunOptions**)>(39)(out);
  }
  Status* set_terminate(RunOptions* options) const {
    return at<Status* (*)(RunOptions*)>(46)(options);
  }

  // A value over memory that is the caller's, who keeps it for as long as the value.
  Status* create_tensor(const MemoryInfo* where, void* data, std::size_t size,
                        const std::int64_t* shape, std::size_t rank, ElementType type,
                        Value** out) const {
    return at<Status* (*)(const MemoryInfo*, void*, std::size_t, const std::int64_t*, std::size_t,
                          ElementType, Value**)>(49)(where, data, size, shape, rank, type, out);
  }
  Status* tensor_data(Value* value, void** out) const {
    return at<Status* (*)(Value*, void**)>(51)(value, out);
  }
  // A view into `type`; null if it is not that of a tensor.
  Status* tensor_info(const TypeInfo* type, const TensorInfo** out) const {
    return at<Status* (*)(const TypeInfo*, const TensorInfo**)>(55)(type, out);
  }
  Status* element_type(const TensorInfo* info, ElementType* out) const {
    return at<Status* (*)(const TensorInfo*, ElementType*)>(60)(info, out);
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

  Status* create_memory_info(const char* name, AllocatorType allocator, int device, MemoryType type,
                             MemoryInfo** out) const {
    return at<Status* (*)(const char*, AllocatorType, int, MemoryType, MemoryInfo**)>(68)(
        name, allocator, device, type, out);
  }
  Status* allocate(Allocator* allocator, std::size_t size, void** out) const {
    return at<Status* (*)(Allocator*, std::size_t, void**)>(75)(allocator, size, out);
  }
  Status* free(Allocator* allocator, void* memory) const {
    return at<Status* (*)(Allocator*, void*)>(76)(allocator, memory);
  }
  Status* default_allocator(Allocator** out) const {  // lives as long as the library
    return at<Status* (*)(Allocator**)>(78)(out);
  }
  Status* create_allocator(const Session* session, const MemoryInfo* where, Allocator** out) const {
    return at<Status* (*)(const Session*, const MemoryInfo*, Allocator**)>(131)(session, where,
                                                                                out);
  }
  // For sessions with session.use_env_allocators. The allocator must outlive the environment.
  Status* register_allocator(Env* env, HostAllocator* allocator) const {
    return at<Status* (*)(Env*, HostAllocator*)>(176)(env, allocator);
  }

  Status* create_cuda_options(CudaOptions** out) const {
    return at<Status* (*)(CudaOptions**)>(205)(out);
  }
  Status* append_cuda(SessionOptions* options, const CudaOptions* cuda) const {
    return at<Status* (*)(SessionOptions*, const CudaOptions*)>(204)(options, cuda);
  }

  void release(Env* it) const { at<void (*)(Env*)>(92)(it); }
  void release(Status* it) const { at<void (*)(Status*)>(93)(it); }
  void release(MemoryInfo* it) const { at<void (*)(MemoryInfo*)>(94)(it); }
  void release(Session* it) const { at<void (*)(Session*)>(95)(it); }
  void release(Value* it) const { at<void (*)(Value*)>(96)(it); }
  void release(RunOptions* it) const { at<void (*)(RunOptions*)>(97)(it); }
  void release(TypeInfo* it) const { at<void (*)(TypeInfo*)>(98)(it); }
  void release(TensorInfo* it) const { at<void (*)(TensorInfo*)>(99)(it); }
  void release(SessionOptions* it) const { at<void (*)(SessionOptions*)>(100)(it); }
  void release(Allocator* it) const { at<void (*)(Allocator*)>(132)(it); }
  void release(CudaOptions* it) const { at<void (*)(CudaOptions*)>(208)(it); }

 private:
  template <typename Function>
  Function at(std::size_t position) const {
    return reinterpret_cast<Function>(table_[position]);
  }
  const Table* table_;
};

}  // namespace attnserve::engine::ort
