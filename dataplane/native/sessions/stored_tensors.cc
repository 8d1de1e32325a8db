#include "sessions/stored_tensors.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "base/random.h"
#include "base/status.h"
#include "base/text.h"

namespace attnserve::sessions {

namespace {

constexpr std::size_t kHandleBytes = 16;
constexpr std::size_t kMostNamed = 80;  // characters of a wrong handle that are repeated

// Tensors may be as small as nothing, and each costs some hundred bytes of bookkeeping, which the
// bound on their elements does not see.
constexpr std::size_t kMostTensors = std::size_t{1} << 16;

// When all room is claimed by tensors that are arriving, none can tell when that ends; a refusal
// without retry-after would say that the tensor never fits.
constexpr std::chrono::milliseconds kArrivalRetry{250};
constexpr std::chrono::milliseconds kLeastRetry{1};

std::chrono::microseconds microseconds(Duration duration) {
  return std::chrono::round<std::chrono::microseconds>(duration);
}

void refuse_empty(std::string_view handle, std::string_view field) {
  if (!handle.empty()) return;
  throw RequestError(invalid_argument(field, "nothing", "a handle that PutTensor answered"));
}

[[noreturn]] void refuse_unknown(std::string_view handle, std::string_view field) {
  throw RequestError(Code::kNotFound,
                     text(field, ": given ", quoted(first_characters(handle, kMostNamed)),
                          "; no such tensor is kept: never put here, dropped, or its lease ran "
                          "out"));
}

}  // namespace

struct StoredTensors::State {
  using Expiries = std::multimap<TimePoint, std::string_view>;  // handles, as `entries` hold them
  struct Entry {
    std::string owner;
    StoredTensorPtr tensor;
    Duration lease;
    Expiries::iterator expiry;
    Lease part;  // of its caller
  };
  using Entries = std::map<std::string, Entry, std::less<>>;
  // Tensors on their way out. Declared before the lock is taken: the memory of large ones goes back
  // to the system, which takes a while, once the lock is free again.
  using Gone = std::vector<StoredTensorPtr>;

  State(std::size_t most_bytes, Duration lease, Duration longest)
      : max_bytes(most_bytes), default_lease(lease), max_lease(longest) {}

  const std::size_t max_bytes;
  const Duration default_lease;
  const Duration max_lease;

  std::mutex mutex;  // guards all below
  Entries entries;
  Expiries expiries;      // one for each entry, the next to run out first
  std::size_t bytes = 0;  // of `entries` and of all rooms

  Duration length(Duration asked) const {
    return std::min(asked <= Duration::zero() ? default_lease : asked, max_lease);
  }

  void forget(Entries::iterator entry, Gone& gone) {
    gone.push_back(std::move(entry->second.tensor));
    bytes -= gone.back()->elements.size();
    expiries.erase(entry->second.expiry);
    entries.erase(entry);
  }

  void forget_expired(TimePoint now, Gone& gone) {
    while (!expiries.empty() && expiries.begin()->first <= now) {
      forget(entries.find(expiries.begin()->second), gone);
    }
  }

  // At least when the soonest lease ends, unless it is renewed.
  std::chrono::microseconds retry_after(TimePoint now) const {
    if (expiries.empty()) return kArrivalRetry;
    const Duration left = expiries.begin()->first - now;
    return std::max<std::chrono::microseconds>(kLeastRetry, microseconds(left));
  }

  // Makes sure that `more` bytes fit for a tensor that has claimed `claimed` already.
  void check_room(std::size_t claimed, std::size_t more, TimePoint now) const {
    if (bytes <= max_bytes && more <= max_bytes - bytes) return;
    const bool could_fit = claimed <= max_bytes && more <= max_bytes - claimed;
    throw RequestError(
        {Code::kResourceExhausted,
         text("tensor: ", claimed + more, " bytes, beside ", bytes - claimed,
              " that are kept; allowed: ", max_bytes, " together (--max-stored-mib)"),
         could_fit ? retry_after(now) : std::chrono::microseconds{0}});
  }

  Entries::iterator find(std::string_view handle, std::string_view owner, std::string_view field) {
    const auto found = entries.find(handle);
    if (found == entries.end() || found->second.owner != owner) refuse_unknown(handle, field);
    return found;
  }

  void start_lease(Entry& entry, TimePoint now) {
    auto node = expiries.extract(entry.expiry);
    node.key() = now + entry.lease;
    entry.expiry = expiries.insert(std::move(node));
  }
};

Room::Room(Room&& other) noexcept
    : store_(other.store_),
      size_(std::exchange(other.size_, 0)),
      part_(std::move(other.part_)),
      has_part_(other.has_part_) {}

Room& Room::operator=(Room&& other) noexcept {
  Room taken(std::move(other));
  std::swap(store_, taken.store_);
  std::swap(size_, taken.size_);
  std::swap(part_, taken.part_);
  std::swap(has_part_, taken.has_part_);
  return *this;  // what this one had goes with `taken`
}

Room::~Room() {
  if (size_ == 0) return;
  StoredTensors::State& state = *store_->state_;
  const std::scoped_lock lock(state.mutex);
  state.bytes -= size_;
}

void Room::claim(std::size_t more) {
  StoredTensors::State& state = *store_->state_;
  StoredTensors::State::Gone gone;
  const std::scoped_lock lock(state.mutex);
  const TimePoint now = Clock::now();
  state.forget_expired(now, gone);
  state.check_room(size_, more, now);
  if (has_part_ && !part_.grow(more)) {
    throw RequestError({Code::kResourceExhausted,
                        text("tensors: ", more,
                             " bytes beside those that this caller has stored; "
                             "allowed are fewer of one caller (--caller-stored-mib)"),
                        state.retry_after(now)});
  }
  state.bytes += more;
  size_ += more;
}

StoredTensors::StoredTensors(std::size_t max_bytes, Duration default_lease, Duration max_lease)
    : state_(std::make_unique<State>(max_bytes, default_lease, max_lease)) {}

StoredTensors::~StoredTensors() = default;

void StoredTensors::check_fits(std::size_t byte_size) {
  State::Gone gone;
  const std::scoped_lock lock(state_->mutex);
  const TimePoint now = Clock::now();
  state_->forget_expired(now, gone);
  state_->check_room(0, byte_size, now);
}

Stored StoredTensors::put(StoredTensor tensor, Room room, Duration lease, std::string_view owner) {
  const std::size_t size = tensor.elements.size();
  if (room.size_ < size) room.claim(size - room.size_);
  const Duration length = state_->length(lease);
  Stored stored{random_url_safe(kHandleBytes), microseconds(length), size};
  auto kept = std::make_shared<const StoredTensor>(std::move(tensor));

  State::Gone gone;
  const std::scoped_lock lock(state_->mutex);
  const TimePoint now = Clock::now();
  state_->forget_expired(now, gone);
  if (state_->entries.size() >= kMostTensors) {
    throw RequestError({Code::kResourceExhausted,
                        text("tensors: ", kMostTensors, " are kept; allowed: ", kMostTensors),
                        state_->retry_after(now)});
  }
  const auto entry =
      state_->entries
          .emplace(stored.handle, State::Entry{std::string(owner), std::move(kept), length, {}, {}})
          .first;
  try {
    entry->second.expiry = state_->expiries.emplace(now + length, entry->first);
  } catch (...) {
    state_->entries.erase(entry);
    throw;
  }
  // From here on the entry holds the bytes that the room had claimed.
  entry->second.part = std::move(room.part_);
  state_->bytes -= std::exchange(room.size_, 0) - size;
  return stored;
}

StoredTensorPtr StoredTensors::get(std::string_view handle, std::string_view owner,
                                   std::string_view field) {
  refuse_empty(handle, field);
  State::Gone gone;
  const std::scoped_lock lock(state_->mutex);
  const TimePoint now = Clock::now();
  state_->forget_expired(now, gone);
  State::Entry& entry = state_->find(handle, owner, field)->second;
  state_->start_lease(entry, now);
  return entry.tensor;
}

Stored StoredTensors::renew(std::string_view handle, std::string_view owner, Duration lease) {
  refuse_empty(handle, "handle");
  State::Gone gone;
  const std::scoped_lock lock(state_->mutex);
  const TimePoint now = Clock::now();
  state_->forget_expired(now, gone);
  State::Entry& entry = state_->find(handle, owner, "handle")->second;
  if (lease > Duration::zero()) entry.lease = state_->length(lease);
  state_->start_lease(entry, now);
  return {std::string(handle), microseconds(entry.lease), entry.tensor->elements.size()};
}

void StoredTensors::drop(std::string_view handle, std::string_view owner) {
  refuse_empty(handle, "handle");
  State::Gone gone;
  const std::scoped_lock lock(state_->mutex);
  state_->forget_expired(Clock::now(), gone);
  state_->forget(state_->find(handle, owner, "handle"), gone);
}

std::size_t StoredTensors::bytes() {
  State::Gone gone;
  const std::scoped_lock lock(state_->mutex);
  state_->forget_expired(Clock::now(), gone);
  return state_->bytes;
}

}  // namespace attnserve::sessions
