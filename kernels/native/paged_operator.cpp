// The inputs of PagedAttention: their shapes are checked here, what they refer to in paged.cpp.
#include "paged_operator.h"

#include <algorithm>
#include <string>
#include <vector>

#include "paged.h"

namespace attnserve {
namespace {

using Shape = std::vector<std::int64_t>;

std::string text(const Shape& shape) {
  std::string all = "[";
  for (const std::int64_t size : shape) {
    if (all.size() > 1) all += ", ";
    all += size < 0 ? "any" : std::to_string(size);
  }
  return all + "]";
}

// Negative sizes of `allowed` stand for any.
void require_shape(const Context& context, const char* name, const Tensor& tensor,
                   const Shape& allowed) {
  bool fits = tensor.shape.size() == allowed.size();
  for (std::size_t i = 0; fits && i < allowed.size(); ++i)
    fits = allowed[i] < 0 || tensor.shape[i] == allowed[i];
  if (!fits)
    context.refuse("attnserve: " + std::string(name) + ": its shape is " + text(tensor.shape) +
                   "; allowed: " + text(allowed));
}

void require_range(const Context& context, const char* name, std::int64_t given, std::int64_t least,
                   std::int64_t most) {
  if (given < least || given > most)
    context.refuse("attnserve: spec: " + std::string(name) + ": given " + std::to_string(given) +
                   "; allowed: " + std::to_string(least) + ".." + std::to_string(most));
}

const std::int64_t* integers(const Tensor& tensor) {
  return static_cast<const std::int64_t*>(tensor.data);
}

// No position is further away.
constexpr std::int64_t kFarthest = std::int64_t{1} << 40;

// Returns whether entropy is wanted.
bool read_spec(const Context& context, const Tensor& spec, PagedProblem& p) {
  // Graphs exported earlier give six numbers, or five before there were latent pages.
  const bool has_latent = spec.shape != Shape{5}, has_entropy = has_latent && spec.shape != Shape{6};
  if (has_entropy) require_shape(context, "spec", spec, {7});
  const std::int64_t* given = integers(spec);
  require_range(context, "page_size", given[0], 1, 1 << 16);
  require_range(context, "cache_dtype", given[1], 0, 4);
  require_range(context, "window", given[2], -1, kFarthest);
  require_range(context, "kept_first", given[3], 0, kFarthest);
  require_range(context, "causal", given[4], 0, 1);
  if (has_latent) require_range(context, "latent", given[5], 0, 1);
  if (has_entropy) require_range(context, "entropy", given[6], 0, 1);
  p.layout.page_size = given[0];
  p.layout.type = static_cast<CacheType>(given[1]);
  p.window = given[2];
  p.kept_first = given[3];
  p.causal = given[4] != 0;
  p.layout.latent = has_latent && given[5] != 0;
  if (!p.causal) require_range(context, "window without causal", p.window, -1, -1);
  if (p.layout.latent && p.layout.value_head_dim > p.layout.head_dim)
    context.refuse("attnserve: spec: latent: given 1 where value_head_dim is " +
                   std::to_string(p.layout.value_head_dim) +
                   "; allowed: 0, or value_head_dim up to " + std::to_string(p.layout.head_dim));
  return !has_entropy || given[6] != 0;
}

}  // namespace

void paged_attention(const Context& context, const PagedSettings& settings, Element element,
                     const std::atomic<bool>* stop) {
  const Tensor query = context.input(0), key = context.input(1), value = context.input(2);
  const Tensor cache = context.input(3), starts = context.input(4), lengths = context.input(5);
  const Tensor table_starts = context.input(6), table = context.input(7);
  const Tensor parents = context.input(9), slopes = context.input(10);
  const Tensor weights_of = context.input(11);
  PagedProblem p{};
  p.layout = {settings.num_kv_heads, settings.head_dim, settings.value_head_dim, 0, {}, false};
  const bool wants_entropy = read_spec(context, context.input(8), p);
  p.element = element;
  p.scale = settings.scale;
  p.softcap = settings.softcap;
  p.stop = stop;

  require_shape(context, "query", query, {-1, -1, settings.head_dim});
  require_shape(context, "cache", cache, {-1});
  require_shape(context, "lengths", lengths, {-1});
  p.num_sequences = lengths.shape[0];
  require_shape(context, "starts", starts, {p.num_sequences + 1});
  require_shape(context, "table_starts", table_starts, {p.num_sequences + 1});
  require_shape(context, "table", table, {-1});
  p.num_heads = query.shape[1];
  if (p.num_heads <= 0 || p.num_heads % settings.num_kv_heads != 0)
    context.refuse("attnserve: query: given " + std::to_string(p.num_heads) +
                   " heads; allowed: multiples of " + std::to_string(settings.num_kv_heads));
  p.num_tokens = query.shape[0];
  p.attends = true;
  const std::int64_t new_keys = key.shape.empty() ? 0 : key.shape[0];
  const bool values = !value.shape.empty() && value.shape[0] > 0;
  context.require(p.layout.latent || (new_keys > 0) == values,
                  "attnserve: key, value: one of them is absent or empty; allowed: both or none");
  context.require(!p.layout.latent || !values,
                  "attnserve: value: given where spec: latent is 1; allowed: none");
  if (new_keys > 0) {
    // New keys and values may come without queries, to be stored alone.
    p.attends = p.num_tokens > 0;
    if (!p.attends) p.num_tokens = new_keys;
    require_shape(context, "key", key, {p.num_tokens, settings.num_kv_heads, settings.head_dim});
    p.key = key.data;
  }
  if (values) {
    require_shape(context, "value", value,
                  {p.num_tokens, settings.num_kv_heads, settings.value_head_dim});
    p.value = value.data;
  }
  if (!parents.shape.empty() && parents.shape[0] > 0) {
    require_shape(context, "parents", parents, {p.num_tokens});
    context.require(p.causal, "attnserve: parents: given where spec: causal is 0; allowed: none");
    p.parents = integers(parents);
  }
  if (slopes.data != nullptr) require_shape(context, "slopes", slopes, {p.num_heads});
  const Tensor sinks = context.input(12);
  if (sinks.data != nullptr) require_shape(context, "sinks", sinks, {p.num_heads});

  if (!weights_of.shape.empty() && weights_of.shape[0] > 0) {
    require_shape(context, "weights_of", weights_of, {-1});
    context.require(p.attends, "attnserve: weights_of: given without query; allowed: none");
    p.weights_of = integers(weights_of);
    p.num_weights_of = weights_of.shape[0];
  }

  p.query = query.data;
  p.cache = static_cast<std::uint8_t*>(const_cast<void*>(cache.data));
  p.cache_bytes = cache.shape[0];
  p.starts = integers(starts);
  p.lengths = integers(lengths);
  p.table_starts = integers(table_starts);
  p.table = integers(table);
  p.table_size = table.shape[0];
  p.slopes = static_cast<const float*>(slopes.data);
  p.sinks = static_cast<const float*>(sinks.data);

  PagedPlan plan(p, Context::cores());
  const std::int64_t rows = query.shape[0];
  p.output = context.output<void>(0, {rows, p.num_heads, settings.value_head_dim});
  p.log_sum_exp = context.output<float>(1, {rows, p.num_heads});
  const std::size_t outputs = context.output_count();
  if (outputs > 2 && wants_entropy)
    p.entropy = context.output<float>(2, {rows, p.num_heads});
  if (outputs > 3) p.weights = context.output<float>(3, {plan.weights_size()});

  const PagedKernel store = store_kernel(), attend = paged_attention_kernel();
  const PagedKernel weigh = weights_kernel();
  if (plan.stores() > 0)
    context.run([&](std::int64_t task) { store(plan, task); }, stop, plan.stores(),
                plan.store_work());
  if (plan.attends() > 0)
    context.run([&](std::int64_t task) { attend(plan, task); }, stop, plan.attends(),
                plan.attend_work());
  if (plan.weighs() > 0 && p.weights != nullptr)
    context.run([&](std::int64_t task) { weigh(plan, task); }, stop, plan.weighs(),
                plan.weigh_work());
}

}  // namespace attnserve
