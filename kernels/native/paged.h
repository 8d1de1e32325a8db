// Attention over keys and values that lie in pages, for a ragged batch of sequences: the operator
// PagedAttention.
//
// A page holds `page_size` tokens of one layer, for all of its key heads, in this order, without
// padding in between:
//
//   keys          [num_kv_heads][page_size][head_dim]         in the cache's type
//   values        [num_kv_heads][page_size][value_head_dim]   in the cache's type
//   key scales    [num_kv_heads][page_size]  float32, int8 and fp8 alone
//   value scales  [num_kv_heads][page_size]  float32, int8 and fp8 alone
//
// rounded up to a multiple of 64 bytes. A latent page holds keys, and scales of keys, alone: the
// value of a token is the first value_head_dim numbers of its key. Pages begin at multiples of 64
// bytes. The token at slot i of a sequence lies in its page i / page_size, at i % page_size of it.
// A number of an int8 or fp8 page is what is stored times the scale of its token and head, which is
// chosen so that the largest magnitude of the row becomes 127 or 448. A row with an infinity or no
// number in it is all no number there.
//
// Rows (a token and a query head) of a sequence that share a key head are computed together, in
// pieces by ranges of keys (flash-decoding: Dao et al.,
// https://crfm.stanford.edu/2023/10/12/flashdecoding.html) whose results are merged by their sums
// of exponentials. How a sequence is cut depends on nothing but itself, so what comes out for it
// does not depend on what else is in the batch or on the number of threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention.h"

namespace attnserve {

enum class CacheType : std::int64_t { kFloat32, kFloat16, kBFloat16, kInt8, kFloat8 };

// Where things lie in a page; see above. Offsets and sizes are in bytes.
struct PageLayout {
  std::int64_t num_kv_heads, head_dim, value_head_dim, page_size;
  CacheType type;
  bool latent = false;

  constexpr std::int64_t element() const {
    return type == CacheType::kFloat32 ? 4 : type >= CacheType::kInt8 ? 1 : 2;
  }
  constexpr bool scaled() const { return type >= CacheType::kInt8; }
  constexpr std::int64_t rows() const { return num_kv_heads * page_size; }
  // Bytes of a token and head's key, of its value, and from its value to the next token's.
  constexpr std::int64_t key_row() const { return head_dim * element(); }
  constexpr std::int64_t value_row() const {
    return latent ? key_row() : value_head_dim * element();
  }
  // Bytes of all that is stored of a token and head, but for scales.
  constexpr std::int64_t row() const { return key_row() + (latent ? 0 : value_row()); }
  constexpr std::int64_t key(std::int64_t head, std::int64_t slot) const {
    return (head * page_size + slot) * key_row();
  }
  constexpr std::int64_t value(std::int64_t head, std::int64_t slot) const {
    return latent ? key(head, slot) : rows() * key_row() + (head * page_size + slot) * value_row();
  }
  constexpr std::int64_t key_scale(std::int64_t head, std::int64_t slot) const {
    return rows() * row() + (head * page_size + slot) * 4;
  }
  constexpr std::int64_t value_scale(std::int64_t head, std::int64_t slot) const {
    return key_scale(head, slot) + (latent ? 0 : rows() * 4);
  }
  constexpr std::int64_t bytes() const {
    const std::int64_t scales = scaled() ? (latent ? 4 : 2 * 4) : 0;
    return (rows() * (row() + scales) + 63) / 64 * 64;
  }
};

// One batch. Tensors are contiguous, in the order of their shapes, of type `element` unless said.
// T new tokens of S sequences lie one after another. Of the operator's inputs, key, value and
// parents without elements count as absent.
struct PagedProblem {
  Element element;
  PageLayout layout;
  const void* query;  // [T, num_heads, head_dim]; without tokens if new keys are to be stored alone
  const void* key;    // null, or [T, num_kv_heads, head_dim]: stored before anything is computed
  const void* value;  // null, or [T, num_kv_heads, value_head_dim]; of latent pages null
  std::uint8_t* cache;
  std::int64_t cache_bytes;
  const std::int64_t* starts;        // [S + 1]: tokens of sequence s are starts[s]..starts[s + 1]
  const std::int64_t* lengths;       // [S]: its keys, once the new ones are stored
  const std::int64_t* table_starts;  // [S + 1]: likewise of its pages in `table`
  const std::int64_t* table;         // offsets in `cache`; -1: given back, no query sees it
  std::int64_t table_size;
  const std::int64_t* parents;  // null, or [T]: among its sequence's new tokens; -1: what is before
  const std::int64_t* weights_of;  // [W]: ascending, the sequences whose weights are wanted
  const float* slopes;  // null, or [num_heads]: ALiBi, -slope * |position - key's position|
  const float* sinks;   // null, or [num_heads]: scores without a value; -inf: none

  void* output;        // [T, num_heads, value_head_dim]; 0 where no key is seen
  float* log_sum_exp;  // [T, num_heads]; -inf there
  float* entropy;      // null, or [T, num_heads], in nats; 0 there
  // Null, or for each of weights_of, one after another, [its new tokens, num_heads, its keys]: 0
  // where a key is not seen.
  float* weights;

  std::int64_t num_sequences, num_tokens, num_heads, num_weights_of;
  bool attends;             // whether there are queries: one for each token
  float scale, softcap;     // softcap 0: none
  std::int64_t window;      // keys before its own position that a query sees; negative: all
  std::int64_t kept_first;  // keys from the start that it sees in any case
  bool causal;              // or every query sees every key

  const std::atomic<bool>* stop;  // as Problem::stop
};

inline bool stopped(const PagedProblem& problem) {
  return problem.stop != nullptr && problem.stop->load(std::memory_order_relaxed);
}

// New tokens that branch: each sees its ancestors, itself and all that was there before.
class TokenTree {
 public:
  // Throws std::invalid_argument unless each parent is -1 or an earlier token.
  TokenTree(const std::int64_t* parents, std::int64_t count);

  std::int64_t depth(std::int64_t token) const { return depth_[token]; }
  bool sees(std::int64_t token, std::int64_t other) const {
    return sees_[token * count_ + other] != 0;
  }

 private:
  std::int64_t count_;
  std::vector<std::int64_t> depth_;
  std::vector<std::uint8_t> sees_;  // [count, count]
};

struct PagedSequence {
  std::int64_t start, count;    // its new tokens
  std::int64_t length, before;  // its keys, and those before the new tokens
  const std::int64_t* pages;
  std::unique_ptr<const TokenTree> tree;  // null: each new token follows the one before

  std::int64_t position(std::int64_t token) const {
    return before + (tree != nullptr ? tree->depth(token) : token);
  }
};

// A row of a sequence: the token row / heads_per_group, and that query head of a key head's group.
// A piece is some rows against some keys, for each key head.
struct PagedPiece {
  std::int64_t sequence, first_row, rows, begin, end;
  std::int64_t group;  // of pieces with the same rows
  std::int64_t part;   // of the group
};

// A piece for some key heads.
struct PagedTask {
  std::int64_t piece, first_head, end_head;
};

// Rows of all key heads of a task, where rows are few.
constexpr std::int64_t kRowsOfHeads = 32;

// Pieces with the same rows, whose results are merged. Their sums are kept, for each key head and
// part, from `sums` on: [rows][value_head_dim + 3].
struct PagedGroup {
  std::int64_t parts, sums, rows;
};

struct KeyRange {
  std::int64_t begin, end;
  bool kept;  // seen whatever the window is
  bool tree;  // keys of this step, in a tree
};

// The weights of one new token.
struct WeightsTask {
  PagedPiece piece;  // its rows of a key head, and all keys
  std::int64_t at;   // where its weights [num_heads, keys] begin
};

// How a batch is computed: first `stores` tasks, each done once by any thread, then `attends` ones,
// then `weighs` ones.
class PagedPlan {
 public:
  // Throws std::invalid_argument, naming what is wrong with the problem. There are tasks for
  // `threads` threads; what comes out does not depend on it.
  PagedPlan(const PagedProblem& problem, std::int64_t threads);

  std::int64_t stores() const;
  std::int64_t attends() const { return static_cast<std::int64_t>(tasks_.size()); }
  std::int64_t weighs() const { return static_cast<std::int64_t>(weights_.size()); }
  // About how many multiplications take as long as all tasks.
  double store_work() const;
  double attend_work() const { return attend_work_; }
  double weigh_work() const;
  // The size of PagedProblem::weights, which may be set once this is known, as may other outputs.
  std::int64_t weights_size() const { return weights_size_; }

  const PagedProblem& problem() const { return problem_; }
  const PagedSequence& sequence(std::int64_t index) const { return sequences_[index]; }
  // The sequence of a token.
  std::int64_t sequence_of(std::int64_t token) const;

  const PagedTask& task(std::int64_t index) const { return tasks_[index]; }
  const PagedPiece& piece(const PagedTask& task) const { return pieces_[task.piece]; }
  const WeightsTask& weights(std::int64_t task) const { return weights_[task]; }
  // The keys that a piece's rows may see, at most three ranges in ascending order.
  int ranges(const PagedPiece& piece, KeyRange* out) const;

  std::int64_t parts(const PagedPiece& piece) const { return groups_[piece.group].parts; }
  // Where part `part` of a piece's group keeps its sums.
  float* sums(const PagedPiece& piece, std::int64_t kv_head, std::int64_t part);
  // Whether all parts of the piece's group are done, once this one is.
  bool finished(const PagedPiece& piece, std::int64_t kv_head);

 private:
  void check_pages(const PagedSequence& sequence, std::int64_t index) const;
  void cut(std::int64_t index);
  void list_weights();
  void list_tasks(std::int64_t threads);

  const PagedProblem& problem_;
  std::vector<PagedSequence> sequences_;
  std::vector<PagedGroup> groups_;
  std::vector<PagedPiece> pieces_;
  std::vector<PagedTask> tasks_;
  std::vector<WeightsTask> weights_;
  double attend_work_ = 0;
  std::int64_t weights_size_ = 0;
  std::unique_ptr<float[]> sums_;
  std::unique_ptr<std::atomic<std::int64_t>[]> done_;  // parts, by group and key head
};

// Tokens that one task stores.
constexpr std::int64_t kTokensPerStore = 32;

using PagedKernel = void (*)(PagedPlan& plan, std::int64_t task);

PagedKernel store_kernel();
PagedKernel paged_attention_kernel();
PagedKernel weights_kernel();

namespace avx512 {
void store_pages(PagedPlan& plan, std::int64_t task);
void attend_pages(PagedPlan& plan, std::int64_t task);
void weigh_pages(PagedPlan& plan, std::int64_t task);
}  // namespace avx512
namespace avx2 {
void store_pages(PagedPlan& plan, std::int64_t task);
void attend_pages(PagedPlan& plan, std::int64_t task);
void weigh_pages(PagedPlan& plan, std::int64_t task);
}  // namespace avx2
namespace generic {
void store_pages(PagedPlan& plan, std::int64_t task);
void attend_pages(PagedPlan& plan, std::int64_t task);
void weigh_pages(PagedPlan& plan, std::int64_t task);
}  // namespace generic

}  // namespace attnserve
