// The operators of domain `attnserve`, as ONNX Runtime loads them:
//
// Attention(query, key, value, key_lengths, bias?, slopes?, softcap?) -> output
// AttentionDiagnostics(query, key, key_lengths, top_k, distances, bias?, slopes?, softcap?)
//     -> entropy, mass_per_key, mass_by_distance, top_k_indices, top_k_weights
//
// Attributes of both: scale, softcap (float; an input of that name replaces it unless it is
// negative), left, right (integer; -1 is all), bottom_right (0 or 1). Shapes and meaning:
// attention.h and docs/kernels.md.
#include <algorithm>
#include <atomic>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "attention.h"
#include "onnxruntime_abi.h"

#define ATTNSERVE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using attnserve::Element;
using attnserve::Problem;

// What stops the computations that begin on this thread: see attnserve_set_stop_flag.
thread_local const std::atomic<bool>* stop_flag = nullptr;

// Multiplications that are worth another thread: waking one takes about 7 us, and what it then does
// should take longer. Double, since sizes multiplied may be more than an integer holds.
constexpr double kWorthThread = 1.5e6;

double attention_work(const Problem& p) {
  const double keys = static_cast<double>(p.batch) * p.key_len * (p.head_dim + p.value_head_dim);
  // Reading a key and its value takes about as long as multiplying them eight times.
  return keys * (static_cast<double>(p.num_heads) * p.query_len + 8.0 * p.num_kv_heads);
}

double diagnosis_work(const Problem& p) {
  const double pairs = static_cast<double>(p.batch) * p.num_heads * p.query_len * p.key_len;
  return pairs * (2.0 * p.head_dim + 100.0);  // scores twice, and what is gathered from each
}

// Carries a status out of nested calls.
struct Failure {
  ort::Status* status;
};

void check(ort::Status* status) {
  if (status != nullptr) throw Failure{status};
}

struct Settings {
  float scale, softcap;
  std::int64_t left, right, bottom_right;
};

struct Node {
  ort::Interface api;
  Settings settings;
  Element element;
};

struct Tensor {
  const void* data = nullptr;
  std::vector<std::int64_t> shape;
};

class Context {
 public:
  Context(const Node& node, ort::KernelContext* context) : node_(node), context_(context) {
    check(node.api.input_count(context, &count_));
  }

  // An input; without data if it is absent.
  Tensor input(std::size_t index) const {
    Tensor tensor;
    const ort::Value* value = nullptr;
    if (index >= count_) return tensor;
    check(node_.api.input(context_, index, &value));
    if (value == nullptr) return tensor;
    ort::TensorInfo* info = nullptr;
    check(node_.api.tensor_info(value, &info));
    std::size_t rank = 0;
    check(node_.api.dimension_count(info, &rank));
    tensor.shape.resize(rank);
    check(node_.api.dimensions(info, tensor.shape.data(), rank));
    node_.api.release_tensor_info(info);
    void* data = nullptr;
    check(node_.api.tensor_data(value, &data));
    tensor.data = data;
    return tensor;
  }

  template <typename T>
  T* output(std::size_t index, const std::vector<std::int64_t>& shape) const {
    ort::Value* value = nullptr;
    check(node_.api.output(context_, index, shape.data(), shape.size(), &value));
    void* data = nullptr;
    check(node_.api.tensor_data(value, &data));
    return static_cast<T*>(data);
  }

  [[noreturn]] void refuse(const std::string& message) const {
    throw Failure{node_.api.create_status(ort::kInvalidArgument, message.c_str())};
  }

  void require(bool condition, const char* message) const {
    if (!condition) refuse(message);
  }

  // Run `kernel` on every task, on ONNX Runtime's own threads. Threads take tasks one by one, since
  // some are much longer than others. `multiplications`: of all tasks, about.
  void run(attnserve::Kernel kernel, const Problem& problem, std::int64_t tasks,
           double multiplications) const {
    // Asked once: the answer is read from files.
    static const std::int64_t cores = std::max(1u, std::thread::hardware_concurrency());
    struct Shared {
      attnserve::Kernel kernel;
      const Problem& problem;
      std::int64_t tasks;
      std::atomic<std::int64_t> next{0};
      std::atomic<bool> failed{false};
    } shared{kernel, problem, tasks};
    const auto work = [](void* data, std::size_t) {
      auto& all = *static_cast<Shared*>(data);
      try {
        for (std::int64_t task; (task = all.next.fetch_add(1)) < all.tasks;) {
          if (attnserve::stopped(all.problem)) return;
          all.kernel(all.problem, task);
        }
      } catch (...) {  // out of memory; nothing may pass through ONNX Runtime's threads
        all.failed = true;
      }
    };
    const std::int64_t most = std::min(tasks, cores);
    const double worth = 1.0 + multiplications / kWorthThread;
    const std::int64_t workers =
        worth < static_cast<double>(most) ? static_cast<std::int64_t>(worth) : most;
    if (workers <= 1) {
      work(&shared, 0);
    } else {
      check(node_.api.parallel_for(context_, work, static_cast<std::size_t>(workers), 0, &shared));
    }
    if (shared.failed) throw std::bad_alloc();
    if (attnserve::stopped(problem))
      throw Failure{node_.api.create_status(ort::kFail, "attnserve: stopped")};
  }

 private:
  const Node& node_;
  ort::KernelContext* context_;
  std::size_t count_ = 0;
};

// What both operators share: query, key, lengths, bias, slopes, softcap.
Problem problem_of(const Context& context, const Node& node, const Tensor& query,
                   const Tensor& key, const Tensor& lengths, const Tensor& bias,
                   const Tensor& slopes, const Tensor& softcap) {
  Problem p{};
  const auto& q = query.shape;
  const auto& k = key.shape;
  context.require(q.size() == 4, "attnserve: query: its rank must be 4");
  context.require(k.size() == 4, "attnserve: key: its rank must be 4");
  context.require(k[0] == q[0] && k[3] == q[3],
                  "attnserve: key: batch and head_dim must be those of query");
  context.require(k[1] > 0 && q[1] % k[1] == 0,
                  "attnserve: key: its heads must divide those of query");
  context.require(lengths.shape == std::vector<std::int64_t>{q[0]},
                  "attnserve: key_lengths: its shape must be [batch]");
  p.stop = stop_flag;
  p.element = node.element;
  p.query = query.data;
  p.key = key.data;
  p.key_lengths = static_cast<const std::int64_t*>(lengths.data);
  p.batch = q[0];
  p.num_heads = q[1];
  p.query_len = q[2];
  p.head_dim = q[3];
  p.num_kv_heads = k[1];
  p.key_len = k[2];
  p.scale = node.settings.scale;
  p.softcap = node.settings.softcap;
  // No further than any key can be, so that sums with it fit.
  const std::int64_t farthest = std::int64_t{1} << 40;
  p.left = std::min(node.settings.left, farthest);
  p.right = std::min(node.settings.right, farthest);
  p.bottom_right = node.settings.bottom_right != 0;
  if (slopes.data != nullptr) {
    context.require(slopes.shape == std::vector<std::int64_t>{p.num_heads},
                    "attnserve: slopes: its shape must be [num_heads]");
    p.slopes = static_cast<const float*>(slopes.data);
  }
  if (softcap.data != nullptr) {
    context.require(softcap.shape == std::vector<std::int64_t>{1},
                    "attnserve: softcap: its shape must be [1]");
    const float given = *static_cast<const float*>(softcap.data);
    if (given >= 0) p.softcap = given;
  }
  if (bias.data != nullptr) {
    const std::int64_t full[4] = {p.batch, p.num_heads, p.query_len, p.key_len};
    context.require(bias.shape.size() == 4, "attnserve: bias: its rank must be 4");
    std::int64_t stride = 1;
    for (int axis = 3; axis >= 0; --axis) {
      const std::int64_t size = bias.shape[axis];
      context.require(size == 1 || size == full[axis],
                      "attnserve: bias: each dimension must be 1 or the full one");
      p.bias_strides[axis] = size == 1 ? 0 : stride;
      stride *= size;
    }
    // The neutral bias, a single 0, costs nothing. 0 is all bits 0 in each element type.
    const bool neutral = stride == 1 && (node.element == Element::kFloat32
                                             ? *static_cast<const float*>(bias.data) == 0
                                             : *static_cast<const std::uint16_t*>(bias.data) == 0);
    if (!neutral) p.bias = bias.data;
  }
  return p;
}

void attention(const Context& context, const Node& node) {
  const Tensor query = context.input(0), key = context.input(1), value = context.input(2);
  Problem p = problem_of(context, node, query, key, context.input(3), context.input(4),
                         context.input(5), context.input(6));
  const auto& v = value.shape;
  context.require(v.size() == 4 && v[0] == p.batch && v[1] == p.num_kv_heads && v[2] == p.key_len,
                  "attnserve: value: batch, heads and length must be those of key");
  p.value = value.data;
  p.value_head_dim = v[3];
  p.output = context.output<void>(0, {p.batch, p.num_heads, p.query_len, p.value_head_dim});
  context.run(attnserve::attention_kernel(), p, attnserve::attention_tasks(p),
              attention_work(p));
}

void diagnostics(const Context& context, const Node& node) {
  Problem p = problem_of(context, node, context.input(0), context.input(1), context.input(2),
                         context.input(5), context.input(6), context.input(7));
  const Tensor top_k = context.input(3), distances = context.input(4);
  const std::vector<std::int64_t> one{1};
  context.require(top_k.shape == one, "attnserve: top_k: its shape must be [1]");
  context.require(distances.shape == one, "attnserve: distances: its shape must be [1]");
  p.top_k = *static_cast<const std::int64_t*>(top_k.data);
  p.distances = *static_cast<const std::int64_t*>(distances.data);
  context.require(p.top_k >= 0 && p.top_k <= p.key_len, "attnserve: top_k: must be 0..key_len");
  context.require(p.distances >= 0 && p.distances <= 1 << 24,
                  "attnserve: distances: must be 0..16777216");
  p.entropy = context.output<float>(0, {p.batch, p.num_heads, p.query_len});
  p.mass_per_key = context.output<float>(1, {p.batch, p.num_heads, p.key_len});
  float* by_distance = context.output<float>(2, {p.batch, p.num_heads, p.distances});
  if (p.distances > 0) p.mass_by_distance = by_distance;
  p.top_indices = context.output<std::int64_t>(3, {p.batch, p.num_heads, p.query_len, p.top_k});
  p.top_weights = context.output<float>(4, {p.batch, p.num_heads, p.query_len, p.top_k});
  context.run(attnserve::diagnosis_kernel(), p, attnserve::diagnosis_tasks(p),
              diagnosis_work(p));
}

template <void (*Compute)(const Context&, const Node&)>
ort::Status* compute(void* kernel, ort::KernelContext* raw) {
  const Node& node = *static_cast<const Node*>(kernel);
  try {
    Compute(Context(node, raw), node);
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    return node.api.create_status(ort::kFail, error.what());
  }
}

ort::Status* create(Element element, const ort::Api* table, const ort::KernelInfo* info,
                    void** kernel) {
  const ort::Interface api(table);
  Settings s{};
  for (ort::Status* status : {api.float_attribute(info, "scale", &s.scale),
                              api.float_attribute(info, "softcap", &s.softcap),
                              api.integer_attribute(info, "left", &s.left),
                              api.integer_attribute(info, "right", &s.right),
                              api.integer_attribute(info, "bottom_right", &s.bottom_right)})
    if (status != nullptr) return status;
  *kernel = new Node{api, s, element};
  return nullptr;
}

constexpr ort::ElementType type_of(Element element) {
  return element == Element::kFloat32   ? ort::kFloat
         : element == Element::kFloat16 ? ort::kFloat16
                                        : ort::kBFloat16;
}

template <Element kElement>
struct AttentionOperator {
  static constexpr const char* kName = "Attention";
  static constexpr std::size_t kInputs = 7, kRequired = 4, kOutputs = 1;
  static ort::ElementType input(std::size_t index) {
    return index == 3 ? ort::kInt64 : index >= 5 ? ort::kFloat : type_of(kElement);
  }
  static ort::ElementType output(std::size_t) { return type_of(kElement); }
  static constexpr auto kCompute = compute<attention>;
};

template <Element kElement>
struct DiagnosticsOperator {
  static constexpr const char* kName = "AttentionDiagnostics";
  static constexpr std::size_t kInputs = 8, kRequired = 5, kOutputs = 5;
  static ort::ElementType input(std::size_t index) {
    return index >= 2 && index <= 4 ? ort::kInt64 : index >= 6 ? ort::kFloat : type_of(kElement);
  }
  static ort::ElementType output(std::size_t index) {
    return index == 3 ? ort::kInt64 : ort::kFloat;
  }
  static constexpr auto kCompute = compute<diagnostics>;
};

template <template <Element> class Operator, Element kElement>
const ort::CustomOp* custom_op() {
  using Described = Operator<kElement>;
  static const ort::CustomOp op = [] {
    ort::CustomOp made{};
    made.version = ort::kOperatorVersion;
    made.name = [](const ort::CustomOp*) { return Described::kName; };
    made.provider = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
    made.input_type = [](const ort::CustomOp*, std::size_t i) { return Described::input(i); };
    made.input_count = [](const ort::CustomOp*) { return Described::kInputs; };
    made.output_type = [](const ort::CustomOp*, std::size_t i) { return Described::output(i); };
    made.output_count = [](const ort::CustomOp*) { return Described::kOutputs; };
    made.input_presence = [](const ort::CustomOp*, std::size_t i) {
      return i < Described::kRequired ? ort::kRequired : ort::kOptional;
    };
    made.output_presence = [](const ort::CustomOp*, std::size_t) { return ort::kRequired; };
    made.input_memory = [](const ort::CustomOp*, std::size_t) { return 0; };
    made.variadic_input_minimum = [](const ort::CustomOp*) { return 1; };
    made.variadic_input_alike = [](const ort::CustomOp*) { return 1; };
    made.variadic_output_minimum = [](const ort::CustomOp*) { return 1; };
    made.variadic_output_alike = [](const ort::CustomOp*) { return 1; };
    made.create_kernel_with_status = [](const ort::CustomOp*, const ort::Api* table,
                                        const ort::KernelInfo* info, void** kernel) {
      return create(kElement, table, info, kernel);
    };
    made.compute_with_status = Described::kCompute;
    made.destroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
    return made;
  }();
  return &op;
}

}  // namespace

ATTNSERVE_EXPORT ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                const ort::ApiBase* base) {
  const ort::Api* table = base->get_api(ort::kApiVersion);
  if (table == nullptr) {
    // There is no table to make a status with; the oldest has the function.
    return ort::Interface(base->get_api(1))
        .create_status(ort::kFail, "attnserve: ONNX Runtime 1.17 or newer is needed");
  }
  const ort::Interface api(table);
  static ort::CustomOpDomain* domain = nullptr;
  try {
    if (domain == nullptr) {  // kept for good: sessions refer to it
      check(api.create_domain("attnserve", &domain));
      for (const ort::CustomOp* op :
           {custom_op<AttentionOperator, Element::kFloat32>(),
            custom_op<AttentionOperator, Element::kFloat16>(),
            custom_op<AttentionOperator, Element::kBFloat16>(),
            custom_op<DiagnosticsOperator, Element::kFloat32>(),
            custom_op<DiagnosticsOperator, Element::kFloat16>(),
            custom_op<DiagnosticsOperator, Element::kBFloat16>()})
        check(api.add_operator(domain, op));
    }
    check(api.add_domain(options, domain));
  } catch (const Failure& failure) {
    return failure.status;
  }
  return nullptr;
}

// Computations of these operators that begin on the calling thread from now on, whichever threads
// they use, end early and fail once `flag` is true. Null: none does. The flag must live until they
// have ended.
ATTNSERVE_EXPORT void attnserve_set_stop_flag(const std::atomic<bool>* flag) { stop_flag = flag; }

ATTNSERVE_EXPORT const char* attnserve_instruction_set() { return attnserve::instruction_set(); }
