// Memory of requests and answers, and the bound on all of it together.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <span>
#include <utility>
#include <vector>

namespace attnserve {

using ByteSpan = std::span<const std::byte>;
using MutableByteSpan = std::span<std::byte>;

// Tensors in messages lie at multiples of this from the message's start; messages themselves do
// too.
constexpr std::size_t kAlignment = 64;

// Counts the bytes that requests in flight hold, from the first byte received to the last byte of
// the answer that was written. Safe to use from any thread. Outlives every Lease.
class ByteBudget {
 public:
  // `whole`: of which this is one caller's part; what is taken here is taken there too.
  explicit ByteBudget(std::size_t total, ByteBudget* whole = nullptr)
      : total_(total), whole_(whole) {}

  bool take(std::size_t size);  // false, and nothing taken, if so many are not left
  void give_back(std::size_t size);
  // From now on; what is lent beyond it stays lent.
  void set_total(std::size_t total) { total_.store(total, std::memory_order_relaxed); }
  std::size_t lent() const { return lent_.load(std::memory_order_relaxed); }
  std::size_t total() const { return total_.load(std::memory_order_relaxed); }
  // Whose bound is in the way of so many more: this one's, else that of the whole.
  const ByteBudget& bound_on(std::size_t more) const;
  bool is_part() const { return whole_ != nullptr; }

 private:
  bool has(std::size_t size, std::size_t lent) const;

  std::atomic<std::size_t> total_;
  ByteBudget* const whole_;
  std::atomic<std::size_t> lent_{0};
};

// Some bytes of a budget, given back exactly once: on destruction. An empty one holds nothing.
class Lease {
 public:
  Lease() = default;
  explicit Lease(ByteBudget& budget) : budget_(&budget) {}
  Lease(Lease&& other) noexcept
      : budget_(std::exchange(other.budget_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Lease& operator=(Lease&& other) noexcept;
  ~Lease() { release(); }

  bool grow(std::size_t more);  // false, and unchanged, if the budget has not so many left
  // As grow; throws RequestError RESOURCE_EXHAUSTED "bytes in flight: ..." instead.
  void grow_or_throw(std::size_t more);
  void release();
  std::size_t size() const { return size_; }

 private:
  ByteBudget* budget_ = nullptr;
  std::size_t size_ = 0;
};

// Owned memory, aligned to kAlignment, from a pool that keeps a bounded number of freed bytes and
// gives them to the system after a while. Move-only; never zeroed.
class Bytes {
 public:
  Bytes() = default;
  // Throws RequestError RESOURCE_EXHAUSTED "memory: none is left for this request".
  static Bytes allocate(std::size_t size);
  Bytes(Bytes&& other) noexcept;
  Bytes& operator=(Bytes&& other) noexcept;
  ~Bytes();

  std::byte* data() { return data_; }
  const std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  MutableByteSpan span() { return {data_, size_}; }
  ByteSpan span() const { return {data_, size_}; }
  void shrink(std::size_t size) { size_ = size; }  // at most what it is

  Lease lease;  // what the budget was charged for it, if anything

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t capacity_ = 0;
};

// Where Bytes come from. The default is aligned memory of the host; the engine puts pinned memory
// in its place where CUDA serves. Set before the first request.
class BytesSource {
 public:
  virtual ~BytesSource() = default;
  virtual void* allocate(std::size_t size) = 0;  // nullptr: none is left
  virtual void release(void* memory, std::size_t size) = 0;
};
void set_bytes_source(std::unique_ptr<BytesSource> source);
// Gives the pool's idle memory back to the system; called once in a while by a loop.
void trim_bytes_pool();
std::size_t pooled_bytes();

// Part of an outgoing message. `owner` keeps the bytes alive; nobody writes to them any more.
struct Piece {
  std::shared_ptr<const void> owner;
  ByteSpan bytes;
};

// An outgoing message: pieces that are written one after another without being joined.
struct OutMessage {
  std::vector<Piece> pieces;
  std::size_t size() const;

  static OutMessage of(Bytes bytes);  // takes the bytes over, lease included
};

}  // namespace attnserve
