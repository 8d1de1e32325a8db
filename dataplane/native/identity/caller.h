// Who calls, what it may do, and how much of the server it may have at once.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "base/clock.h"
#include "base/memory.h"
#include "base/rate.h"
#include "base/status.h"

namespace attnserve::identity {

// What a caller may do; a method asks for one of some. The numbers are the binding's.
using Roles = std::uint32_t;
constexpr Roles kInfer = 1, kSessions = 2, kAdmin = 4, kMove = 8;
constexpr Roles kAllRoles = kInfer | kSessions | kAdmin | kMove;

// "infer, sessions"
std::string names_of(Roles roles);

// Of one caller, all its connections together; 0: no bound of its own.
struct Bounds {
  double requests_per_second = 0;
  std::size_t bytes_in_flight = 0;
  std::size_t stored_bytes = 0;
  std::size_t sessions = 0;
  std::size_t session_bytes = 0;  // promised to them
  std::size_t calls = 0;          // open at once
};

// What somebody was recognized by, so that it can be looked up again. No secret.
struct Credential {
  enum class Kind : std::uint8_t { kToken, kWebToken, kCertificate };
  Kind kind;
  std::array<std::uint8_t, 32> place{};  // of a token: where it is kept
  double until = 0;                      // of a JSON Web Token, in seconds since 1970
  std::string key;                       // and what names the key that has signed it
};

class Caller;

// One open call of a caller, given back on destruction. An empty one is nobody's.
class OpenCall {
 public:
  OpenCall() = default;
  OpenCall(OpenCall&& other) noexcept : caller_(std::move(other.caller_)) { other.caller_ = {}; }
  OpenCall& operator=(OpenCall&& other) noexcept {
    std::swap(caller_, other.caller_);
    return *this;
  }
  ~OpenCall();

 private:
  friend class Caller;
  explicit OpenCall(std::shared_ptr<Caller> caller) : caller_(std::move(caller)) {}
  std::shared_ptr<Caller> caller_;
};

// Any thread. Who holds bytes of its budgets, or may come to, holds it too.
class Caller : public std::enable_shared_from_this<Caller> {
 public:
  // `name`: empty for callers that are not told apart but by where they call from.
  Caller(std::string name_, std::uint64_t number_, ByteBudget& all_in_flight, const Bounds& bounds);

  void set(const Bounds& bounds);
  // One more call; RESOURCE_EXHAUSTED if so many are open, or came within a second.
  std::optional<Status> enter(TimePoint now, OpenCall& call);
  // One more request, on a call that is open already.
  std::optional<Status> request(TimePoint now);
  std::size_t open_calls() const { return calls_.load(std::memory_order_relaxed); }
  std::size_t most_sessions() const { return most_sessions_.load(std::memory_order_relaxed); }
  std::size_t most_session_bytes() const {
    return most_session_bytes_.load(std::memory_order_relaxed);
  }
  bool idle() const { return open_calls() == 0 && in_flight.lent() == 0 && stored.lent() == 0; }

  const std::string name;
  const std::uint64_t number;  // never another caller's, and no connection's
  ByteBudget in_flight;        // within that of all requests
  ByteBudget stored{0};        // of PutTensor

 private:
  friend class OpenCall;

  Rate rate_;
  std::atomic<std::size_t> calls_{0};
  std::atomic<std::size_t> most_calls_{0}, most_sessions_{0}, most_session_bytes_{0};
};

}  // namespace attnserve::identity
