// Attention over tiles that stay in cache, in time proportional to the keys that are seen.
//
// Every row of queries sees one contiguous range of keys: padding, causal masks, sliding windows and
// chunks are such ranges; a prefix is a second one, alike for all rows. What a boolean mask hides
// besides is looked up. Scores of a tile are kept transposed, one query per vector lane, so that
// softmax needs no sums across lanes and neither keys nor values need to be repacked. The softmax is
// computed online (Milakov and Gimelshein, https://arxiv.org/abs/1805.02867), the tiling is that of
// FlashAttention (Dao et al., https://arxiv.org/abs/2205.14135).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace attnserve {

enum class Element { kFloat32, kFloat16, kBFloat16 };

// One attention. Tensors are contiguous, in the order of their shapes, of type `element`.
struct Problem {
  Element element;
  const void* query;             // [batch, num_heads, query_len, head_dim]
  const void* key;               // [batch, num_kv_heads, key_len, head_dim]
  const void* value;             // [batch, num_kv_heads, key_len, value_head_dim]
  const std::int64_t* key_lengths;  // [batch]; keys from there on are padding. Null if packed
  const void* bias;              // null, or broadcast by bias_strides; added to the scores
  const std::uint8_t* mask;      // null, or broadcast by mask_strides: 1 where a key may be seen
  const float* slopes;           // null, or [num_heads]: ALiBi, -slope * |position - key|
  const float* sinks;            // null, or [num_heads]: scores without a value; -inf: none
  void* output;                  // [batch, num_heads, query_len, value_head_dim]
  float* log_sum_exp;            // null, or [batch, num_heads, query_len]: of all scores and the sink

  std::int64_t batch, num_heads, num_kv_heads, query_len, key_len, head_dim, value_head_dim;
  std::int64_t bias_strides[4];  // in elements; 0 where the dimension is 1
  std::int64_t mask_strides[4];  // likewise

  float scale;
  float softcap;       // 0: none
  std::int64_t left;   // keys before its own position that a query sees; negative: all
  std::int64_t right;  // keys after it; negative: all
  bool bottom_right;   // query i is at position key_length - query_len + i instead of i
  std::int64_t chunk;  // a query sees keys of its own chunk, positions chunk * n.. alone; 0: all
  const std::int64_t* prefix_lengths;  // null, or [sequences()]: keys below are seen by all queries

  // Packed sequences lie one after another along query_len and key_len of a batch of one; positions
  // count from each one's first query and key.
  std::int64_t packed;               // how many; 0: the batch has one sequence a row
  const std::int64_t* query_starts;  // [packed + 1]: sequence s has queries [s]..[s + 1]
  const std::int64_t* key_starts;    // likewise
  const std::int64_t* task_starts;   // likewise, of the pieces of one key head: see packed_tasks

  // Null, or what ends the computation early once it is true: looked at from tile to tile. What
  // comes out then is incomplete.
  const std::atomic<bool>* stop;

  // Outputs of a diagnosis; each may be null. All are float32 but the indices.
  float* entropy;              // [batch, num_heads, query_len], in nats
  float* mass_per_key;         // [batch, num_heads, key_len]
  float* mass_by_distance;     // [sequences(), num_heads, distances]
  std::int64_t distances;      // beyond distances - 1, the last one gathers
  std::int64_t* top_indices;   // [batch, num_heads, query_len, top_k]
  float* top_weights;          // likewise
  std::int64_t top_k;

  std::int64_t sequences() const { return packed > 0 ? packed : batch; }
};

inline bool stopped(const Problem& problem) {
  return problem.stop != nullptr && problem.stop->load(std::memory_order_relaxed);
}

// How many pieces of work a problem is cut into; each may be done by any thread, once.
std::int64_t attention_tasks(const Problem& problem);

// Where the pieces of each packed sequence begin, of one key head: what `task_starts` points to.
std::vector<std::int64_t> packed_tasks(const Problem& problem);

// Do one piece. `Kernel` is one of the implementations below, for one instruction set each.
using Kernel = void (*)(const Problem& problem, std::int64_t task);

Kernel attention_kernel();
Kernel diagnosis_kernel();
const char* instruction_set();

// Pieces of a diagnosis: one per sequence and head, since rows add up to the mass of a key.
std::int64_t diagnosis_tasks(const Problem& problem);

namespace avx512 {
void attend(const Problem& problem, std::int64_t task);
void diagnose(const Problem& problem, std::int64_t task);
}  // namespace avx512
namespace avx2 {
void attend(const Problem& problem, std::int64_t task);
void diagnose(const Problem& problem, std::int64_t task);
}  // namespace avx2
namespace generic {
void attend(const Problem& problem, std::int64_t task);
void diagnose(const Problem& problem, std::int64_t task);
}  // namespace generic

// Queries of one piece of work: enough for a tile of keys to be used often while it is in cache.
constexpr std::int64_t kQueriesPerTask = 192;

}  // namespace attnserve
