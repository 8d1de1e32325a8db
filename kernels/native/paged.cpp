// How a batch over pages is checked and cut into pieces.
#include "paged.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace attnserve {
namespace {

[[noreturn]] void refuse(const std::string& message) {
  throw std::invalid_argument("attnserve: " + message);
}

std::string at(const char* name, std::int64_t index) {
  return std::string(name) + "[" + std::to_string(index) + "]";
}

// Keys of a piece: enough for the merging to cost nothing, few enough for one long sequence to use
// all cores. Many rows take more, since each piece keeps sums for each of them; from two pieces of
// rows on, those are parallel enough.
std::int64_t keys_per_piece(std::int64_t rows) {
  if (rows <= 48) return 512;
  if (rows <= kQueriesPerTask) return 4096;
  return std::int64_t{1} << 40;
}

// Offsets of `count` parts: from 0, none less than the one before, up to `total`.
void check_starts(const char* name, const std::int64_t* starts, std::int64_t count,
                  std::int64_t total) {
  if (starts[0] != 0) refuse(at(name, 0) + ": given " + std::to_string(starts[0]) + "; allowed: 0");
  for (std::int64_t i = 0; i < count; ++i)
    if (starts[i + 1] < starts[i] || starts[i + 1] > total)
      refuse(at(name, i + 1) + ": given " + std::to_string(starts[i + 1]) +
             "; allowed: " + std::to_string(starts[i]) + ".." + std::to_string(total));
  if (starts[count] != total)
    refuse(at(name, count) + ": given " + std::to_string(starts[count]) +
           "; allowed: " + std::to_string(total));
}

bool is_chain(const std::int64_t* parents, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i)
    if (parents[i] != i - 1) return false;
  return true;
}

}  // namespace

TokenTree::TokenTree(const std::int64_t* parents, std::int64_t count)
    : count_(count), depth_(count), sees_(count * count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t parent = parents[i];
    if (parent < -1 || parent >= i)
      refuse("parents: given " + std::to_string(parent) + " for new token " + std::to_string(i) +
             " of its sequence; allowed: -1, or an earlier one");
    std::uint8_t* row = sees_.data() + i * count;
    if (parent >= 0) {
      std::copy_n(sees_.data() + parent * count, parent + 1, row);
      depth_[i] = depth_[parent] + 1;
    }
    row[i] = 1;
  }
}

PagedPlan::PagedPlan(const PagedProblem& p, std::int64_t threads) : problem_(p) {
  check_starts("starts", p.starts, p.num_sequences, p.num_tokens);
  check_starts("table_starts", p.table_starts, p.num_sequences, p.table_size);
  sequences_.reserve(p.num_sequences);
  for (std::int64_t index = 0; index < p.num_sequences; ++index) {
    PagedSequence s{};
    s.start = p.starts[index];
    s.count = p.starts[index + 1] - s.start;
    s.length = p.lengths[index];
    s.before = s.length - s.count;
    s.pages = p.table + p.table_starts[index];
    const std::int64_t pages = p.table_starts[index + 1] - p.table_starts[index];
    const std::int64_t least = p.key != nullptr ? s.count : 0;
    const std::int64_t most =
        std::min(pages, (std::int64_t{1} << 24) / p.layout.page_size) * p.layout.page_size;
    if (s.count > 0 && (s.length < least || s.length > most))
      refuse(at("lengths", index) + ": given " + std::to_string(s.length) +
             "; allowed: " + std::to_string(least) + ".." + std::to_string(most) + ", for " +
             std::to_string(s.count) + " new tokens and " + std::to_string(pages) + " pages of " +
             std::to_string(p.layout.page_size));
    if (p.parents != nullptr && !is_chain(p.parents + s.start, s.count)) {
      if (s.before < 0)
        refuse(at("lengths", index) + ": given " + std::to_string(s.length) +
               "; allowed: at least the tokens of its tree, " + std::to_string(s.count));
      s.tree = std::make_unique<const TokenTree>(p.parents + s.start, s.count);
    }
    if (s.count > 0) check_pages(s, index);
    sequences_.push_back(std::move(s));
  }
  if (!p.attends) return;
  for (std::int64_t index = 0; index < p.num_sequences; ++index) cut(index);
  list_weights();
  // The same keys one after another, for sequences that share pages; of these the last rows first,
  // which under a causal mask take longest.
  std::stable_sort(pieces_.begin(), pieces_.end(), [](const PagedPiece& a, const PagedPiece& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.first_row > b.first_row;
  });
  list_tasks(threads);
  std::int64_t size = 0;
  for (PagedGroup& group : groups_) {
    group.sums = size;
    if (group.parts > 1)
      size += p.layout.num_kv_heads * group.parts * group.rows * (p.layout.value_head_dim + 3);
  }
  if (size > 0) {
    sums_ = std::unique_ptr<float[]>(new float[size]);
    done_ = std::make_unique<std::atomic<std::int64_t>[]>(groups_.size() * p.layout.num_kv_heads);
  }
}

void PagedPlan::check_pages(const PagedSequence& s, std::int64_t index) const {
  const PagedProblem& p = problem_;
  const std::int64_t size = p.layout.page_size, bytes = p.layout.bytes();
  const auto check = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t page = begin / size; page * size < end; ++page) {
      const std::int64_t offset = s.pages[page];
      if (offset < 0 || offset % 64 != 0 || offset > p.cache_bytes - bytes)
        refuse(at("table", p.table_starts[index] + page) + ": given " + std::to_string(offset) +
               "; allowed: multiples of 64 in 0.." + std::to_string(p.cache_bytes - bytes) +
               ", since page " + std::to_string(page) + " of sequence " + std::to_string(index) +
               " is used");
    }
  };
  if (p.key != nullptr) check(s.before, s.length);
  if (!p.attends) return;
  const bool windowed = p.window >= 0 && p.causal;
  const std::int64_t first = windowed ? std::max<std::int64_t>(0, s.before - p.window) : 0;
  if (windowed) check(0, std::min(p.kept_first, s.length));
  if (first < s.length) check(first, s.length);
}

void PagedPlan::cut(std::int64_t index) {
  const PagedProblem& p = problem_;
  const PagedSequence& s = sequences_[index];
  const std::int64_t heads_per_group = p.num_heads / p.layout.num_kv_heads;
  const std::int64_t rows = s.count * heads_per_group;
  const std::int64_t keys = keys_per_piece(rows);
  for (std::int64_t row = 0; row < rows; row += kQueriesPerTask) {
    const auto group = static_cast<std::int64_t>(groups_.size());
    PagedPiece piece{index, row, std::min(kQueriesPerTask, rows - row), 0, s.length, group, 0};
    for (std::int64_t begin = 0; begin < s.length; begin += keys) {
      piece.begin = begin;
      piece.end = std::min(s.length, begin + keys);
      KeyRange seen[3];
      std::int64_t count = 0;
      const int ranges_seen = ranges(piece, seen);
      for (int i = 0; i < ranges_seen; ++i) count += seen[i].end - seen[i].begin;
      if (count == 0) continue;
      pieces_.push_back(piece);
      ++piece.part;
      // Reading a key and its value takes about as long as multiplying them eight times.
      attend_work_ += static_cast<double>(count) * (p.layout.head_dim + p.layout.value_head_dim) *
                      static_cast<double>(piece.rows + 8) * p.layout.num_kv_heads;
    }
    if (piece.part == 0) {  // sees nothing: there is still an output to write
      piece.begin = piece.end = 0;
      pieces_.push_back(piece);
      ++piece.part;
    }
    groups_.push_back({piece.part, 0, piece.rows});
  }
}

// Pieces of few rows are for as many heads as leave work for all threads, since the heads of a page
// lie one after another. If several sequences share a page, then for one: what each of them reads
// is to stay in a core's own cache. Other pieces are for one head, which is work enough.
void PagedPlan::list_tasks(std::int64_t threads) {
  const PagedProblem& p = problem_;
  const std::int64_t heads = p.layout.num_kv_heads;
  const auto count = static_cast<std::int64_t>(pieces_.size());
  const auto page_of = [&](std::int64_t piece) {
    const PagedPiece& of = pieces_[piece];
    return of.end > 0 ? sequences_[of.sequence].pages[of.begin / p.layout.page_size] : -1;
  };
  const std::int64_t parts =
      std::min(heads, std::max<std::int64_t>(1, 4 * threads / std::max<std::int64_t>(1, count)));
  const std::int64_t most = (heads + parts - 1) / parts;
  for (std::int64_t first = 0, end; first < count; first = end) {
    const std::int64_t page = page_of(first);
    for (end = first + 1; page >= 0 && end < count && page_of(end) == page;) ++end;
    const std::int64_t rows = pieces_[first].rows;
    const bool apart = end - first > 1 || rows > kRowsOfHeads;
    const std::int64_t together = apart ? 1 : std::min(most, kRowsOfHeads / rows);
    for (std::int64_t head = 0; head < heads; head += together)
      for (std::int64_t piece = first; piece < end; ++piece)
        tasks_.push_back({piece, head, std::min(heads, head + together)});
  }
}

void PagedPlan::list_weights() {
  const PagedProblem& p = problem_;
  const std::int64_t heads_per_group = p.num_heads / p.layout.num_kv_heads;
  for (std::int64_t i = 0; i < p.num_weights_of; ++i) {
    const std::int64_t index = p.weights_of[i], least = i == 0 ? 0 : p.weights_of[i - 1] + 1;
    if (index < least || index >= p.num_sequences)
      refuse(at("weights_of", i) + ": given " + std::to_string(index) + "; allowed: " +
             std::to_string(least) + ".." + std::to_string(p.num_sequences - 1) + ", ascending");
    const PagedSequence& s = sequences_[index];
    for (std::int64_t token = 0; token < s.count; ++token) {
      const std::int64_t first_row = token * heads_per_group;
      weights_.push_back({{index, first_row, heads_per_group, 0, s.length, 0, 0}, weights_size_});
      weights_size_ += p.num_heads * s.length;
    }
  }
}

int PagedPlan::ranges(const PagedPiece& piece, KeyRange* out) const {
  const PagedProblem& p = problem_;
  const PagedSequence& s = sequences_[piece.sequence];
  const std::int64_t heads_per_group = p.num_heads / p.layout.num_kv_heads;
  const std::int64_t first_token = piece.first_row / heads_per_group;
  const std::int64_t last_token = (piece.first_row + piece.rows - 1) / heads_per_group;
  std::int64_t end = piece.end, kept = 0, first = 0;
  if (p.causal) end = std::min(end, s.before + last_token + 1);
  if (p.causal && p.window >= 0) {
    kept = p.kept_first;
    // The shallowest token of a tree may be any.
    const std::int64_t shallowest = s.tree != nullptr ? s.before : s.position(first_token);
    first = std::max<std::int64_t>(0, shallowest - p.window);
  }
  const std::int64_t branching = s.tree != nullptr ? s.before : s.length;
  int count = 0;
  const auto add = [&](std::int64_t from, std::int64_t to, bool is_kept, bool is_tree) {
    from = std::max(from, piece.begin);
    to = std::min(to, end);
    if (from < to) out[count++] = {from, to, is_kept, is_tree};
  };
  add(0, std::min(kept, branching), true, false);
  add(std::max(first, kept), branching, false, false);
  add(branching, s.length, false, true);
  return count;
}

std::int64_t PagedPlan::stores() const {
  if (problem_.key == nullptr) return 0;
  return (problem_.num_tokens + kTokensPerStore - 1) / kTokensPerStore;
}

double PagedPlan::store_work() const {
  const PageLayout& layout = problem_.layout;
  return 8.0 * static_cast<double>(problem_.num_tokens) * layout.num_kv_heads *
         (layout.head_dim + layout.value_head_dim);
}

double PagedPlan::weigh_work() const {
  double rows = 0;
  for (const WeightsTask& task : weights_) rows += static_cast<double>(task.piece.end);
  return rows * static_cast<double>(problem_.num_heads) * problem_.layout.head_dim;
}

std::int64_t PagedPlan::sequence_of(std::int64_t token) const {
  const std::int64_t* end = problem_.starts + problem_.num_sequences + 1;
  return std::upper_bound(problem_.starts, end, token) - problem_.starts - 1;
}

float* PagedPlan::sums(const PagedPiece& piece, std::int64_t kv_head, std::int64_t part) {
  const PagedGroup& group = groups_[piece.group];
  return sums_.get() + group.sums +
         (kv_head * group.parts + part) * group.rows * (problem_.layout.value_head_dim + 3);
}

bool PagedPlan::finished(const PagedPiece& piece, std::int64_t kv_head) {
  std::atomic<std::int64_t>& done = done_[piece.group * problem_.layout.num_kv_heads + kv_head];
  // What the other parts wrote is seen by the one that finds itself the last.
  return done.fetch_add(1, std::memory_order_acq_rel) + 1 == groups_[piece.group].parts;
}

}  // namespace attnserve
