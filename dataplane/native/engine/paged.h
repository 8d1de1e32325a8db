// Layers of KV sessions on their graph: computed alone, or several as one.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/memory.h"
#include "base/tensor.h"
#include "engine/attend.h"
#include "engine/model.h"

namespace attnserve::engine {

// Whether a paged variant gives weights and knows latent layers; graphs exported earlier do not.
bool gives_weights(const Variant& paged);
// Whether it takes sinks; nor do those.
bool takes_sinks(const Variant& paged);

// What works must have in common to be joined, as the operator PagedAttention takes it.
struct PagedSpec {
  std::int64_t page_tokens = 16;
  std::int64_t cache_type = 0;  // the operator's number
  std::int64_t window = -1;     // keys before its own that a query sees; -1: all
  std::int64_t kept_first = 0;  // the first keys, which it sees besides
  bool causal = true;           // or every query sees every key
  bool latent = false;          // keys hold the values, which do not come
};

// One layer of some sequences: checked, complete, ready to run. Tensors and spans are views;
// whoever made the work keeps their memory until it has run. T new tokens of S sequences lie one
// after another.
struct PagedWork {
  const Variant* variant = nullptr;  // the model's, kPagedVariant
  PagedSpec spec;
  MutableByteSpan cache;  // with the sequences' pages, which are read and written

  Tensor query;                           // [T, H, D]; data == nullptr: from hidden_states
  std::span<const std::int64_t> starts;   // [S+1], of each sequence's tokens
  std::span<const std::int64_t> parents;  // [T], as the operator takes them; empty: no trees
  // Added to the cache before the queries are computed. data == nullptr: there are none, and of
  // their shapes the first size does not count. Of a latent layer there is no value.
  Tensor key, value;                         // [C, Hkv, D] and [C, Hkv, Dv]
  std::span<const std::int64_t> key_starts;  // [S+1]; same as `starts` where causal
  // [H] FP32, -inf: none; for graphs that take them. Works whose sinks lie in one place have the
  // same.
  Tensor sinks;
  // Of a layer model, which makes query, key and value of it itself; they have shapes alone.
  Tensor hidden_states;  // [T, E]

  std::vector<std::int64_t> lengths;          // [S], of keys, the new ones included
  std::vector<std::int64_t> table_starts{0};  // [S+1]
  std::vector<std::int64_t> table;            // offset of each page in `cache`; -1: given back

  // Where to put what is wanted; data == nullptr: not wanted. May be unaligned.
  Tensor output;                // [T, H, Dv], of a layer model [T, E]; the model's dtype
  Tensor log_sum_exp, entropy;  // [T, H] FP32
  // Attention weights of these sequences, ascending: [t, H, K] FP32 of t tokens and K keys each.
  std::vector<std::int64_t> weights_of;
  std::vector<Tensor> weights;

  // Adds a sequence.
  void add(std::int64_t length, std::span<const std::int64_t> pages);
  bool joinable() const { return spec.causal || key.data == nullptr; }
};

// Whether a graph of the variant kPagedVariant turns queries and keys by their positions itself.
// Then keys of a step are at its queries' positions, as in causal layers alone.
bool takes_positions(const Variant& paged);

// Equal for works that can run as one if both are joinable, and take alike long for a unit.
BatchKey batch_key(const PagedWork& work);
// What its time is about proportional to.
std::int64_t units(const PagedWork& work);
// Estimated memory that it takes while it runs.
std::size_t working_bytes(const PagedWork& work);

// Computes works of one key in one run, and puts the results where each wants them. One work alone
// is computed without a copy. Throws as Session::run; then pages may hold some of the new keys.
void attend_paged_together(std::span<PagedWork* const> works, Stop* stop);

}  // namespace attnserve::engine
