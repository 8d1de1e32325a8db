#include "identity/caller.h"

#include <algorithm>
#include <array>
#include <limits>

#include "base/text.h"

namespace attnserve::identity {
namespace {

constexpr std::array<std::pair<Roles, std::string_view>, 4> kNames{
    {{kInfer, "infer"}, {kSessions, "sessions"}, {kAdmin, "admin"}, {kMove, "move"}}};

// Calls end when their callers let them; nobody can foretell it.
constexpr std::chrono::milliseconds kCallRetry{50};
constexpr std::size_t kNoBound = std::numeric_limits<std::size_t>::max();

}  // namespace

std::string names_of(Roles roles) {
  std::string names;
  for (const auto& [role, name] : kNames) {
    if ((roles & role) == 0) continue;
    if (!names.empty()) names += ", ";
    names += name;
  }
  return names.empty() ? "none" : names;
}

OpenCall::~OpenCall() {
  if (caller_) caller_->calls_.fetch_sub(1, std::memory_order_relaxed);
}

Caller::Caller(std::string name_, std::uint64_t number_, ByteBudget& all_in_flight,
               const Bounds& bounds)
    : name(std::move(name_)), number(number_), in_flight(kNoBound, &all_in_flight) {
  set(bounds);
}

void Caller::set(const Bounds& bounds) {
  const auto bound = [](std::size_t most) { return most == 0 ? kNoBound : most; };
  in_flight.set_total(bound(bounds.bytes_in_flight));
  stored.set_total(bound(bounds.stored_bytes));
  rate_.set(bounds.requests_per_second);
  most_calls_ = bounds.calls;
  most_sessions_ = bounds.sessions;
  most_session_bytes_ = bounds.session_bytes;
}

std::optional<Status> Caller::enter(TimePoint now, OpenCall& call) {
  if (auto refused = request(now)) return refused;
  const std::size_t before = calls_.fetch_add(1, std::memory_order_relaxed);
  call = OpenCall(shared_from_this());
  const std::size_t most = most_calls_.load(std::memory_order_relaxed);
  if (most == 0 || before < most) return std::nullopt;
  return Status{
      Code::kResourceExhausted,
      text("calls: ", before, " of this caller are open; allowed: ", most, " (--caller-calls)"),
      kCallRetry};
}

std::optional<Status> Caller::request(TimePoint now) {
  const std::optional<Duration> wait = rate_.take(now);
  if (!wait) return std::nullopt;
  return Status{Code::kResourceExhausted,
                "requests: more a second than this caller may send (--caller-requests-per-second)",
                std::max(std::chrono::microseconds(1000),
                         std::chrono::ceil<std::chrono::microseconds>(*wait))};
}

}  // namespace attnserve::identity
