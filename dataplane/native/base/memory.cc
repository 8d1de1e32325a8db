#include "base/memory.h"

#include "base/bytes_pool.h"
#include "base/status.h"
#include "base/text.h"

namespace attnserve {

namespace {

// Bytes come back as answers are written, which nobody can foretell; a caller who asks again after
// this long neither spins nor waits for much longer than most requests take.
constexpr std::chrono::milliseconds kBudgetRetry{50};

}  // namespace

bool ByteBudget::has(std::size_t size, std::size_t lent) const {
  const std::size_t most = total();
  return size <= most && lent <= most - size;
}

bool ByteBudget::take(std::size_t size) {
  if (whole_ != nullptr && !whole_->take(size)) return false;
  std::size_t lent = lent_.load(std::memory_order_relaxed);
  do {
    if (!has(size, lent)) {
      if (whole_ != nullptr) whole_->give_back(size);
      return false;
    }
  } while (!lent_.compare_exchange_weak(lent, lent + size, std::memory_order_relaxed));
  return true;
}

void ByteBudget::give_back(std::size_t size) {
  lent_.fetch_sub(size, std::memory_order_relaxed);
  if (whole_ != nullptr) whole_->give_back(size);
}

const ByteBudget& ByteBudget::bound_on(std::size_t more) const {
  return whole_ == nullptr || !has(more, lent()) ? *this : *whole_;
}

Lease& Lease::operator=(Lease&& other) noexcept {
  if (this != &other) {
    release();
    budget_ = std::exchange(other.budget_, nullptr);
    size_ = std::exchange(other.size_, 0);
  }
  return *this;
}

bool Lease::grow(std::size_t more) {
  if (budget_ == nullptr) return more == 0;
  if (!budget_->take(more)) return false;
  size_ += more;
  return true;
}

void Lease::grow_or_throw(std::size_t more) {
  if (grow(more)) return;
  const ByteBudget* bound = budget_ == nullptr ? nullptr : &budget_->bound_on(more);
  const std::size_t lent = bound == nullptr ? 0 : bound->lent();
  const std::size_t total = bound == nullptr ? 0 : bound->total();
  const bool of_caller = bound != nullptr && bound->is_part();
  Status status{Code::kResourceExhausted,
                text("bytes in flight: ", lent, " are in use and ", more,
                     " more were asked for; allowed: ", total,
                     of_caller ? " of one caller (--caller-in-flight-mib)" : ""),
                {}};
  const bool could_fit = size_ <= total && more <= total - size_;
  if (could_fit) status.retry_after = kBudgetRetry;
  throw RequestError(std::move(status));
}

void Lease::release() {
  if (budget_ != nullptr && size_ > 0) budget_->give_back(std::exchange(size_, 0));
}

Bytes Bytes::allocate(std::size_t size) {
  Bytes bytes;
  if (size == 0) return bytes;
  const PoolBlock block = pool_take(size);
  if (block.memory == nullptr) {
    throw RequestError(Code::kResourceExhausted, "memory: none is left for this request");
  }
  bytes.data_ = block.memory;
  bytes.size_ = size;
  bytes.capacity_ = block.capacity;
  return bytes;
}

Bytes::Bytes(Bytes&& other) noexcept
    : lease(std::move(other.lease)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      capacity_(std::exchange(other.capacity_, 0)) {}

Bytes& Bytes::operator=(Bytes&& other) noexcept {
  if (this != &other) {
    if (data_ != nullptr) pool_give_back({data_, capacity_});
    lease = std::move(other.lease);
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
    capacity_ = std::exchange(other.capacity_, 0);
  }
  return *this;
}

Bytes::~Bytes() {
  if (data_ != nullptr) pool_give_back({data_, capacity_});
}

std::size_t OutMessage::size() const {
  std::size_t total = 0;
  for (const Piece& piece : pieces) total += piece.bytes.size();
  return total;
}

OutMessage OutMessage::of(Bytes bytes) {
  auto owner = std::make_shared<const Bytes>(std::move(bytes));
  const ByteSpan all = owner->span();
  OutMessage message;
  message.pieces.push_back({std::move(owner), all});
  return message;
}

}  // namespace attnserve
