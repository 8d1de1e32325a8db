// Who is known: tokens and certificates, and the callers behind them.
//
// Secrets. A token is 256 random bits, of which only the SHA-256 digest is kept. A digest is looked
// up under a second digest, of it and a secret of this process, so that how long a look-up takes
// says nothing of what is kept; what was found is compared in constant time. Neither a token nor
// a digest is ever logged, or repeated in a message.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <variant>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "identity/caller.h"

namespace attnserve::identity {

using Digest = std::array<std::uint8_t, 32>;

Digest sha256(std::string_view bytes);

// The token of "Bearer TOKEN" (RFC 6750, 2.1: the scheme in any case, one space or more, then
// letters, digits and "-._~+/" with "=" at the end); nothing if it is not that.
std::optional<std::string_view> bearer_token(std::string_view authorization);

// One credential of the file of callers.
struct Known {
  std::string name;
  Roles roles = 0;
  std::string kind;   // "sha256": of a token; "certificate"
  std::string value;  // the digest's 32 bytes, or a name in the certificate
  Bounds bounds;
};

struct CallersOptions {
  bool required = false;        // whether callers must say who they are
  bool web_tokens = false;      // whether JSON Web Tokens may be shown, which others check
  Roles certificate_roles = 0;  // of certificates that no line names
  Bounds bounds = {};           // of callers for whom no line says otherwise
};

// "authorization: given GIVEN; allowed: ...", UNAUTHENTICATED.
Status unauthenticated(std::string_view given);

// Who calls, and what it may do.
struct Recognized {
  std::shared_ptr<Caller> caller;
  Roles roles = 0;
  std::shared_ptr<const Credential> credential = nullptr;  // none: it need not say who it is
};

// A JSON Web Token that has not been seen before: somebody has to check it, then `admit` it. It
// lives as long as the text that `recognize` was given.
struct Unchecked {
  std::string_view token;
};

using Verdict = std::variant<Recognized, Unchecked, Status>;

// Any thread. `in_flight` outlives it.
class Callers {
 public:
  Callers(const CallersOptions& options, ByteBudget& in_flight);

  bool required() const { return options_.required; }
  bool checks_web_tokens() const { return options_.web_tokens; }

  // Who says `authorization`, or holds a certificate with these names, the most telling first.
  // Status: UNAUTHENTICATED.
  Verdict recognize(std::string_view authorization, std::span<const std::string> certificate);
  // Somebody who need not say who it is: told apart by where it calls from.
  Recognized at(std::string_view address);

  // Replaces everything that was known, `keys`: what names those that sign JSON Web Tokens. Callers
  // of the same name go on with what they hold.
  void replace(const std::vector<Known>& known, const std::vector<std::string>& keys = {});
  // A JSON Web Token that was checked by a key that `replace` named last: good until then (seconds
  // since 1970).
  Recognized admit(std::string_view token, const std::string& name, Roles roles, double until,
                   const std::string& key);
  // What a caller that was recognized may do now; nothing: its credential does not count any more,
  // or is another's. `certificate` as it was then.
  std::optional<Roles> still(const Caller& caller, const Credential& credential,
                             std::span<const std::string> certificate);
  // Whom a header names, without a call; nothing if nobody.
  std::optional<Recognized> look_up(std::string_view authorization);

  // Bounds of a caller's sessions, whether it has called or not. `owner`: "@" and its name, or
  // where it calls from.
  Bounds bounds_of(std::string_view owner) const;

  std::size_t size() const;  // callers with state

 private:
  struct Entry {
    Digest digest{};
    Recognized who;
    double until = 0;  // seconds since 1970; 0: for ever
  };
  struct Hash {
    std::size_t operator()(const Digest& digest) const;
  };
  using Table = std::unordered_map<Digest, Entry, Hash>;

  Digest place_of(const Digest& digest) const;
  std::optional<Recognized> find(const Table& table, const Digest& place,
                                 const Digest& digest) const;
  std::optional<Recognized> by_certificate(std::span<const std::string> certificate);
  std::shared_ptr<Caller> caller(const std::string& key, const std::string& name,
                                 const Bounds& bounds);
  void forget_idle();

  const CallersOptions options_;
  ByteBudget& in_flight_;
  const Digest secret_;

  mutable std::shared_mutex mutex_;  // guards what follows
  Table tokens_;
  Table web_tokens_;  // checked ones
  std::vector<std::string> web_keys_;
  std::map<std::string, Recognized, std::less<>> certificates_;
  std::map<std::string, std::shared_ptr<Caller>, std::less<>> callers_;
  std::uint64_t last_number_;
};

}  // namespace attnserve::identity
