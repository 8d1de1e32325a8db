// How sessions are set up, and memory that suits the device they run on.
#include <string>
#include <utility>

#include "engine/onnxruntime.h"

namespace attnserve::engine {
namespace {

void append_cuda(const OnnxRuntime& runtime, ort::SessionOptions* options) {
  const ort::Interface& api = runtime.api();
  const auto cuda =
      runtime.make<ort::CudaOptions>([&](auto out) { return api.create_cuda_options(out); });
  runtime.check(api.append_cuda(options, cuda.get()));
}

// A graph that hands its input on, for a session that gives its allocators alone: ModelProto of IR
// version 8 and opset 13, one Identity of float tensors x to y.
constexpr unsigned char kIdentity[] = {
    0x08, 0x08,                                                 // ir_version
    0x3a, 0x33,                                                 // graph
    0x0a, 0x10, 0x0a, 0x01, 'x',  0x12, 0x01, 'y',              // its node: input, output,
    0x22, 0x08, 'I',  'd',  'e',  'n',  't',  'i',  't',  'y',  // op_type
    0x12, 0x01, 'g',                                            // its name
    0x5a, 0x0d, 0x0a, 0x01, 'x',  0x12, 0x08, 0x0a, 0x06,       // its input: name, type,
    0x08, 0x01, 0x12, 0x02, 0x0a, 0x00,                         // of one dimension
    0x62, 0x0d, 0x0a, 0x01, 'y',  0x12, 0x08, 0x0a, 0x06,       // its output likewise
    0x08, 0x01, 0x12, 0x02, 0x0a, 0x00,                         //
    0x42, 0x02, 0x10, 0x0d};                                    // opset_import // opset_import

class PinnedMemory final : public BytesSource {
 public:
  PinnedMemory(std::shared_ptr<const OnnxRuntime> runtime, Handle<ort::Session> session,
               Handle<ort::Allocator> allocator)
      : runtime_(std::move(runtime)),
        session_(std::move(session)),
        allocator_(std::move(allocator)) {}

  void* allocate(std::size_t size) override {
    void* memory = nullptr;
    ort::Status* failed = runtime_->api().allocate(allocator_.get(), size, &memory);
    if (failed == nullptr) return memory;
    runtime_->message_of(failed);
    return nullptr;
  }
  void release(void* memory, std::size_t) override {
    if (ort::Status* failed = runtime_->api().free(allocator_.get(), memory)) {
      runtime_->message_of(failed);  // nothing can be done about it
    }
  }

 private:
  std::shared_ptr<const OnnxRuntime> runtime_;
  Handle<ort::Session> session_;  // whose allocator it is
  Handle<ort::Allocator> allocator_;
};

}  // namespace

Handle<ort::SessionOptions> session_options(const OnnxRuntime& runtime,
                                            const SessionOptions& wanted) {
  const ort::Interface& api = runtime.api();
  auto options =
      runtime.make<ort::SessionOptions>([&](auto out) { return api.create_session_options(out); });
  ort::SessionOptions* to = options.get();
  runtime.check(api.set_intra_op_threads(to, wanted.intra_op_threads));
  // Attention is one chain of operators: nothing runs beside it within a computation.
  runtime.check(api.set_inter_op_threads(to, 1));
  runtime.check(api.set_execution_mode(to, ort::kSequential));
  runtime.check(
      api.add_config_entry(to, "session.intra_op.allow_spinning", wanted.spinning ? "1" : "0"));
  // Memory on the host is ours: see host_allocator.h. Nor does it note, for good, how it divided
  // memory for each combination of lengths that it has met.
  runtime.check(api.disable_cpu_arena(to));
  runtime.check(api.add_config_entry(to, "session.use_env_allocators", "1"));
  runtime.check(api.disable_memory_pattern(to));
  // Errors come as statuses; nothing else of its log is for the operator.
  runtime.check(api.set_severity(to, ort::kFatal));
  runtime.register_operators(to);
  if (wanted.cuda) append_cuda(runtime, to);
  return options;
}

std::unique_ptr<BytesSource> pinned_memory(std::shared_ptr<Runtime> loaded) {
  const auto runtime = std::static_pointer_cast<const OnnxRuntime>(std::move(loaded));
  const ort::Interface& api = runtime->api();
  SessionOptions wanted;
  wanted.cuda = true;
  const Handle<ort::SessionOptions> options = session_options(*runtime, wanted);
  auto session = runtime->make<ort::Session>([&](auto out) {
    return api.create_session(runtime->env(), kIdentity, sizeof kIdentity, options.get(), out);
  });
  const auto info = runtime->make<ort::MemoryInfo>([&](auto out) {
    return api.create_memory_info("CudaPinned", ort::kDeviceAllocator, 0, ort::kCpuOutput, out);
  });
  auto allocator = runtime->make<ort::Allocator>(
      [&](auto out) { return api.create_allocator(session.get(), info.get(), out); });
  return std::make_unique<PinnedMemory>(runtime, std::move(session), std::move(allocator));
}

}  // namespace attnserve::engine
