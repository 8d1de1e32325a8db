#include "sessions/uploads.h"

#include <utility>

#include "base/status.h"
#include "base/text.h"
#include "sessions/shared_memory.h"

namespace attnserve::sessions {
namespace {

// Uploads end in their callers' time, which nobody can foretell.
constexpr std::chrono::milliseconds kRetry{250};

}  // namespace

Uploads::Uploads(std::size_t total, std::string option)
    : share_(total / 2), option_(std::move(option)) {}

Upload Uploads::begin(std::string_view peer) {
  const std::scoped_lock lock(mutex_);
  const auto caller = callers_.try_emplace(std::string(address_of(peer))).first;
  ++caller->second.uploads;
  return Upload(*this, caller);
}

void Uploads::check(const Caller& caller, std::size_t more) const {
  if (caller.bytes <= share_ && more <= share_ - caller.bytes) return;
  if (caller.uploads == 1 && !caller.crowds_others) return;
  throw RequestError({Code::kResourceExhausted,
                      text("uploads: given ", caller.bytes + more, " bytes in ", caller.uploads,
                           " under way; allowed: ", share_, " of one caller, half of ", option_),
                      kRetry});
}

Upload::Upload(Upload&& other) noexcept
    : uploads_(std::exchange(other.uploads_, nullptr)),
      caller_(other.caller_),
      bytes_(std::exchange(other.bytes_, 0)) {}

Upload& Upload::operator=(Upload&& other) noexcept {
  Upload taken(std::move(other));
  std::swap(uploads_, taken.uploads_);
  std::swap(caller_, taken.caller_);
  std::swap(bytes_, taken.bytes_);
  return *this;  // what this one had goes with `taken`
}

Upload::~Upload() {
  if (uploads_ == nullptr) return;
  const std::scoped_lock lock(uploads_->mutex_);
  caller_->second.bytes -= bytes_;
  if (--caller_->second.uploads == 0) uploads_->callers_.erase(caller_);
}

void Upload::take(std::size_t more) {
  if (uploads_ == nullptr) return;
  const std::scoped_lock lock(uploads_->mutex_);
  uploads_->check(caller_->second, more);
  caller_->second.bytes += more;
  bytes_ += more;
}

void Upload::lacks_room() {
  if (uploads_ == nullptr) return;
  const std::scoped_lock lock(uploads_->mutex_);
  for (auto& [peer, other] : uploads_->callers_) {
    if (&other != &caller_->second && other.bytes > uploads_->share_) other.crowds_others = true;
  }
}

}  // namespace attnserve::sessions
