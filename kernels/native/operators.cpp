// The operators of domain `attnserve`, as ONNX Runtime loads them:
//
// Attention(query, key, value, key_lengths?, bias?, slopes?, softcap?, mask?, prefix_lengths?,
//           query_starts?, key_starts?, sinks?) -> output, log_sum_exp?
// AttentionDiagnostics(query, key, key_lengths?, top_k, distances, bias?, slopes?, softcap?, mask?,
//                      prefix_lengths?, query_starts?, key_starts?, sinks?)
//     -> entropy, mass_per_key, mass_by_distance, top_k_indices, top_k_weights
// Sequences are rows of the batch, with key_lengths, or packed in one row, with the two starts.
//
// PagedAttention(query, key?, value?, cache, starts, lengths, table_starts, table, spec, parents?,
//                slopes?, weights_of?, sinks?) -> output, log_sum_exp, entropy?, weights?
//
// Attributes of the first two: scale, softcap (float; an input of that name replaces it unless it is
// negative), left, right (integer; -1 is all), bottom_right (0 or 1), chunk (0 or absent: none). Of PagedAttention: scale,
// softcap, num_kv_heads, head_dim, value_head_dim; it writes into `cache`. Shapes and meaning:
// attention.h, paged.h and docs/kernels.md.
#include <algorithm>
#include <atomic>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention.h"
#include "onnxruntime_abi.h"
#include "operator_context.h"
#include "paged_operator.h"

#define ATTNSERVE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using attnserve::check;
using attnserve::Context;
using attnserve::Element;
using attnserve::Failure;
using attnserve::PagedSettings;
using attnserve::Problem;
using attnserve::Tensor;

// What stops the computations that begin on this thread: see attnserve_set_stop_flag.
thread_local const std::atomic<bool>* stop_flag = nullptr;

// Pairs of a query and a key of one sequence, of one head.
double pairs_of(const Problem& p) {
  if (p.packed == 0) return static_cast<double>(p.batch) * p.query_len * p.key_len;
  double pairs = 0;
  for (std::int64_t s = 0; s < p.packed; ++s)
    pairs += static_cast<double>(p.query_starts[s + 1] - p.query_starts[s]) *
             (p.key_starts[s + 1] - p.key_starts[s]);
  return pairs;
}

double attention_work(const Problem& p) {
  const double keys = static_cast<double>(p.batch) * p.key_len;
  // Reading a key and its value takes about as long as multiplying them eight times.
  return (p.head_dim + p.value_head_dim) * (p.num_heads * pairs_of(p) + 8.0 * p.num_kv_heads * keys);
}

double diagnosis_work(const Problem& p) {
  const double pairs = p.num_heads * pairs_of(p);
  return pairs * (2.0 * p.head_dim + 100.0);  // scores twice, and what is gathered from each
}

struct Settings {
  float scale, softcap;
  std::int64_t left, right, bottom_right, chunk;
};

// A node of a graph.
template <typename Settings>
struct NodeOf {
  ort::Interface api;
  Settings settings;
  Element element;
};

using Node = NodeOf<Settings>;
using PagedNode = NodeOf<PagedSettings>;

// The strides of a tensor that broadcasts to [batch, num_heads, query_len, key_len], and how many
// elements it has.
std::int64_t broadcast_strides(const Context& context, const Problem& p, const Tensor& tensor,
                               const std::string& name, std::int64_t* strides) {
  const std::int64_t full[4] = {p.batch, p.num_heads, p.query_len, p.key_len};
  context.require(tensor.shape.size() == 4, ("attnserve: " + name + ": its rank must be 4").c_str());
  std::int64_t stride = 1;
  for (int axis = 3; axis >= 0; --axis) {
    const std::int64_t size = tensor.shape[axis];
    context.require(size == 1 || size == full[axis],
                    ("attnserve: " + name + ": each dimension must be 1 or the full one").c_str());
    strides[axis] = size == 1 ? 0 : stride;
    stride *= size;
  }
  return stride;
}

// Where packed sequences begin: from 0 to `end`, none before the one before it.
const std::int64_t* starts_of(const Context& context, const Tensor& starts, std::int64_t end,
                              const char* name) {
  const auto* at = static_cast<const std::int64_t*>(starts.data);
  const bool right = starts.shape.size() == 1 && starts.shape[0] >= 2 && at[0] == 0 &&
                     at[starts.shape[0] - 1] == end && std::is_sorted(at, at + starts.shape[0]);
  if (!right)
    context.refuse("attnserve: " + std::string(name) + ": must rise from 0 to " +
                   std::to_string(end));
  return at;
}

// Which sequences there are: rows of the batch, or packed.
void place_sequences(const Context& context, const Tensor& lengths, const Tensor& prefixes,
                     const Tensor& query_starts, const Tensor& key_starts, Problem& p) {
  if (query_starts.data != nullptr) {
    context.require(p.batch == 1, "attnserve: query: packed sequences lie in a batch of 1");
    p.query_starts = starts_of(context, query_starts, p.query_len, "query_starts");
    p.key_starts = starts_of(context, key_starts.data == nullptr ? query_starts : key_starts,
                             p.key_len, "key_starts");
    context.require(key_starts.data == nullptr || key_starts.shape == query_starts.shape,
                    "attnserve: key_starts: its shape must be that of query_starts");
    p.packed = query_starts.shape[0] - 1;
  } else {
    context.require(lengths.shape == std::vector<std::int64_t>{p.batch},
                    "attnserve: key_lengths: its shape must be [batch]");
    p.key_lengths = static_cast<const std::int64_t*>(lengths.data);
  }
  if (prefixes.data != nullptr) {
    context.require(prefixes.shape == std::vector<std::int64_t>{p.sequences()},
                    "attnserve: prefix_lengths: its shape must be [sequences]");
    p.prefix_lengths = static_cast<const std::int64_t*>(prefixes.data);
  }
}

// What both operators share, from `first` on their inputs in the same order: bias, slopes, softcap,
// mask, prefix_lengths, query_starts, key_starts, sinks.
Problem problem_of(const Context& context, const Node& node, const Tensor& query,
                   const Tensor& key, const Tensor& lengths, std::size_t first) {
  const Tensor bias = context.input(first), slopes = context.input(first + 1),
               softcap = context.input(first + 2), mask = context.input(first + 3);
  Problem p{};
  const auto& q = query.shape;
  const auto& k = key.shape;
  context.require(q.size() == 4, "attnserve: query: its rank must be 4");
  context.require(k.size() == 4, "attnserve: key: its rank must be 4");
  context.require(k[0] == q[0] && k[3] == q[3],
                  "attnserve: key: batch and head_dim must be those of query");
  context.require(k[1] > 0 && q[1] % k[1] == 0,
                  "attnserve: key: its heads must divide those of query");
  p.stop = stop_flag;
  p.element = node.element;
  p.query = query.data;
  p.key = key.data;
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
  p.chunk = std::min(node.settings.chunk, farthest);
  place_sequences(context, lengths, context.input(first + 4), context.input(first + 5),
                  context.input(first + 6), p);
  if (slopes.data != nullptr) {
    context.require(slopes.shape == std::vector<std::int64_t>{p.num_heads},
                    "attnserve: slopes: its shape must be [num_heads]");
    p.slopes = static_cast<const float*>(slopes.data);
  }
  const Tensor sinks = context.input(first + 7);
  if (sinks.data != nullptr) {
    context.require(sinks.shape == std::vector<std::int64_t>{p.num_heads},
                    "attnserve: sinks: its shape must be [num_heads]");
    p.sinks = static_cast<const float*>(sinks.data);
  }
  if (softcap.data != nullptr) {
    context.require(softcap.shape == std::vector<std::int64_t>{1},
                    "attnserve: softcap: its shape must be [1]");
    const float given = *static_cast<const float*>(softcap.data);
    if (given >= 0) p.softcap = given;
  }
  if (bias.data != nullptr) {
    const std::int64_t size = broadcast_strides(context, p, bias, "bias", p.bias_strides);
    // The neutral bias, a single 0, costs nothing. 0 is all bits 0 in each element type.
    const bool neutral = size == 1 && (node.element == Element::kFloat32
                                             ? *static_cast<const float*>(bias.data) == 0
                                             : *static_cast<const std::uint16_t*>(bias.data) == 0);
    if (!neutral) p.bias = bias.data;
  }
  if (mask.data != nullptr) {
    const auto* given = static_cast<const std::uint8_t*>(mask.data);
    const std::int64_t size = broadcast_strides(context, p, mask, "mask", p.mask_strides);
    const bool neutral = size == 1 && *given != 0;
    if (!neutral) p.mask = given;
  }
  return p;
}

// A problem with its sequences cut into pieces.
struct Cut {
  explicit Cut(Problem& p) : starts(attnserve::packed_tasks(p)) { p.task_starts = starts.data(); }
  std::vector<std::int64_t> starts;
};

void attention(const Context& context, const Node& node) {
  const Tensor query = context.input(0), key = context.input(1), value = context.input(2);
  Problem p = problem_of(context, node, query, key, context.input(3), 4);
  const auto& v = value.shape;
  context.require(v.size() == 4 && v[0] == p.batch && v[1] == p.num_kv_heads && v[2] == p.key_len,
                  "attnserve: value: batch, heads and length must be those of key");
  p.value = value.data;
  p.value_head_dim = v[3];
  p.output = context.output<void>(0, {p.batch, p.num_heads, p.query_len, p.value_head_dim});
  if (context.output_count() > 1)
    p.log_sum_exp = context.output<float>(1, {p.batch, p.num_heads, p.query_len});
  const Cut cut(p);
  const attnserve::Kernel kernel = attnserve::attention_kernel();
  context.run([&](std::int64_t task) { kernel(p, task); }, p.stop, attnserve::attention_tasks(p),
              attention_work(p));
}

void diagnostics(const Context& context, const Node& node) {
  Problem p = problem_of(context, node, context.input(0), context.input(1), context.input(2), 5);
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
  float* by_distance = context.output<float>(2, {p.sequences(), p.num_heads, p.distances});
  if (p.distances > 0) p.mass_by_distance = by_distance;
  p.top_indices = context.output<std::int64_t>(3, {p.batch, p.num_heads, p.query_len, p.top_k});
  p.top_weights = context.output<float>(4, {p.batch, p.num_heads, p.query_len, p.top_k});
  const attnserve::Kernel kernel = attnserve::diagnosis_kernel();
  context.run([&](std::int64_t task) { kernel(p, task); }, p.stop, attnserve::diagnosis_tasks(p),
              diagnosis_work(p));
}

void paged(const Context& context, const PagedNode& node) {
  attnserve::paged_attention(context, node.settings, node.element, stop_flag);
}

template <typename Node, void (*Compute)(const Context&, const Node&)>
ort::Status* compute(void* kernel, ort::KernelContext* raw) {
  const Node& node = *static_cast<const Node*>(kernel);
  try {
    Compute(Context(node.api, raw), node);
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::invalid_argument& error) {
    return node.api.create_status(ort::kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return node.api.create_status(ort::kFail, error.what());
  }
}

void read(const ort::Interface& api, const ort::KernelInfo* info, Settings& s) {
  check(api.float_attribute(info, "scale", &s.scale));
  check(api.float_attribute(info, "softcap", &s.softcap));
  check(api.integer_attribute(info, "left", &s.left));
  check(api.integer_attribute(info, "right", &s.right));
  check(api.integer_attribute(info, "bottom_right", &s.bottom_right));
  // Graphs exported earlier have none.
  ort::Status* absent = api.integer_attribute(info, "chunk", &s.chunk);
  if (absent != nullptr) {
    api.release_status(absent);
    s.chunk = 0;
  }
}

void read(const ort::Interface& api, const ort::KernelInfo* info, PagedSettings& s) {
  check(api.float_attribute(info, "scale", &s.scale));
  check(api.float_attribute(info, "softcap", &s.softcap));
  const auto read_size = [&](const char* name, std::int64_t& size) {
    check(api.integer_attribute(info, name, &size));
    if (size > 0 && size <= 1 << 16) return;
    const std::string message = "attnserve: " + std::string(name) + ": given " +
                                std::to_string(size) + "; allowed: 1..65536";
    throw Failure{api.create_status(ort::kInvalidArgument, message.c_str())};
  };
  read_size("num_kv_heads", s.num_kv_heads);
  read_size("head_dim", s.head_dim);
  read_size("value_head_dim", s.value_head_dim);
}

template <typename Settings>
ort::Status* create(Element element, const ort::Api* table, const ort::KernelInfo* info,
                    void** kernel) {
  const ort::Interface api(table);
  Settings settings{};
  try {
    read(api, info, settings);
  } catch (const Failure& failure) {
    return failure.status;
  }
  *kernel = new NodeOf<Settings>{api, settings, element};
  return nullptr;
}

template <typename Node>
void destroy(void* kernel) {
  delete static_cast<Node*>(kernel);
}

constexpr ort::ElementType type_of(Element element) {
  return element == Element::kFloat32   ? ort::kFloat
         : element == Element::kFloat16 ? ort::kFloat16
                                        : ort::kBFloat16;
}

template <Element kElement>
struct AttentionOperator {
  static constexpr const char* kName = "Attention";
  static constexpr std::size_t kInputs = 12, kOutputs = 2;
  static bool requires_input(std::size_t index) { return index < 3; }
  static bool requires_output(std::size_t index) { return index == 0; }
  static ort::ElementType input(std::size_t index) {
    return index == 11                ? ort::kFloat
           : index == 3 || index >= 8 ? ort::kInt64
           : index == 7               ? ort::kBool
           : index >= 5               ? ort::kFloat
                                      : type_of(kElement);
  }
  static ort::ElementType output(std::size_t index) {
    return index == 0 ? type_of(kElement) : ort::kFloat;
  }
  static constexpr auto kCreate = create<Settings>;
  static constexpr auto kCompute = compute<Node, attention>;
  static constexpr auto kDestroy = destroy<Node>;
};

template <Element kElement>
struct DiagnosticsOperator {
  static constexpr const char* kName = "AttentionDiagnostics";
  static constexpr std::size_t kInputs = 13, kOutputs = 5;
  static bool requires_input(std::size_t index) { return index < 5 && index != 2; }
  static bool requires_output(std::size_t) { return true; }
  static ort::ElementType input(std::size_t index) {
    return index == 12                              ? ort::kFloat
           : (index >= 2 && index <= 4) || index >= 9 ? ort::kInt64
           : index == 8                               ? ort::kBool
           : index >= 6                               ? ort::kFloat
                                                      : type_of(kElement);
  }
  static ort::ElementType output(std::size_t index) {
    return index == 3 ? ort::kInt64 : ort::kFloat;
  }
  static constexpr auto kCreate = create<Settings>;
  static constexpr auto kCompute = compute<Node, diagnostics>;
  static constexpr auto kDestroy = destroy<Node>;
};

template <Element kElement>
struct PagedOperator {
  static constexpr const char* kName = "PagedAttention";
  static constexpr std::size_t kInputs = 13, kOutputs = 4;
  static bool requires_input(std::size_t index) { return index == 0 || (index >= 3 && index <= 8); }
  static bool requires_output(std::size_t index) { return index < 2; }
  static ort::ElementType input(std::size_t index) {
    return index < 3                    ? type_of(kElement)
           : index == 3               ? ort::kUint8
           : index == 10 || index == 12 ? ort::kFloat
                                        : ort::kInt64;
  }
  static ort::ElementType output(std::size_t index) {
    return index == 0 ? type_of(kElement) : ort::kFloat;
  }
  static constexpr auto kCreate = create<PagedSettings>;
  static constexpr auto kCompute = compute<PagedNode, paged>;
  static constexpr auto kDestroy = destroy<PagedNode>;
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
      return Described::requires_input(i) ? ort::kRequired : ort::kOptional;
    };
    made.output_presence = [](const ort::CustomOp*, std::size_t i) {
      return Described::requires_output(i) ? ort::kRequired : ort::kOptional;
    };
    made.input_memory = [](const ort::CustomOp*, std::size_t) { return 0; };
    made.variadic_input_minimum = [](const ort::CustomOp*) { return 1; };
    made.variadic_input_alike = [](const ort::CustomOp*) { return 1; };
    made.variadic_output_minimum = [](const ort::CustomOp*) { return 1; };
    made.variadic_output_alike = [](const ort::CustomOp*) { return 1; };
    made.create_kernel_with_status = [](const ort::CustomOp*, const ort::Api* table,
                                        const ort::KernelInfo* info, void** kernel) {
      return Described::kCreate(kElement, table, info, kernel);
    };
    made.compute_with_status = Described::kCompute;
    made.destroy = Described::kDestroy;
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
            custom_op<DiagnosticsOperator, Element::kBFloat16>(),
            custom_op<PagedOperator, Element::kFloat32>(),
            custom_op<PagedOperator, Element::kFloat16>(),
            custom_op<PagedOperator, Element::kBFloat16>()})
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
