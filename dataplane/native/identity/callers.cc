#include "identity/callers.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/rand.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

#include "base/never_destroyed.h"
#include "base/text.h"

namespace attnserve::identity {
namespace {

// Beyond so many callers, those that hold nothing are forgotten: addresses and names come and go.
constexpr std::size_t kManyCallers = 4096;
constexpr std::size_t kMostWebTokens = std::size_t{1} << 16;
constexpr std::size_t kMostTokenBytes = 8192;
// Numbers of callers, beside those of connections, which count from 1.
constexpr std::uint64_t kFirstNumber = std::uint64_t{1} << 63;

Digest random_digest() {
  Digest random;
  if (RAND_bytes(random.data(), static_cast<int>(random.size())) != 1) {
    throw std::runtime_error("no random numbers are to be had");
  }
  return random;
}

bool equal(const Digest& one, const Digest& other) {
  return CRYPTO_memcmp(one.data(), other.data(), one.size()) == 0;
}

double since_1970() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

// Header, claims and signature: three parts, none of them empty (RFC 7519, 7515).
bool looks_like_web_token(std::string_view token) {
  const std::size_t first = token.find('.');
  if (first == std::string_view::npos || first == 0) return false;
  const std::size_t second = token.find('.', first + 1);
  return second != std::string_view::npos && second > first + 1 && second + 1 < token.size() &&
         token.find('.', second + 1) == std::string_view::npos;
}

bool is_token_character(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
         c == '.' || c == '_' || c == '~' || c == '+' || c == '/';
}

// One for each thread: making them costs more than using them.
EVP_MD_CTX& hashing() {
  struct Free {
    void operator()(EVP_MD_CTX* context) const { EVP_MD_CTX_free(context); }
  };
  thread_local const std::unique_ptr<EVP_MD_CTX, Free> context(EVP_MD_CTX_new());
  if (!context) throw std::bad_alloc();
  return *context;
}

// What every certificate is recognized by.
const std::shared_ptr<const Credential>& certified() {
  static NeverDestroyed<std::shared_ptr<const Credential>> instance(
      std::make_shared<const Credential>(Credential{Credential::Kind::kCertificate, {}, 0, {}}));
  return *instance;
}

}  // namespace

Status unauthenticated(std::string_view given) {
  return {Code::kUnauthenticated,
          text("authorization: given ", given,
               "; allowed: Bearer and a token that this server knows, or a certificate"),
          {}};
}

Digest sha256(std::string_view bytes) {
  static EVP_MD* const kind = EVP_MD_fetch(nullptr, "SHA256", nullptr);  // kept for ever
  EVP_MD_CTX& context = hashing();
  Digest digest;
  unsigned size = 0;
  if (kind == nullptr || EVP_DigestInit_ex2(&context, kind, nullptr) != 1 ||
      EVP_DigestUpdate(&context, bytes.data(), bytes.size()) != 1 ||
      EVP_DigestFinal_ex(&context, digest.data(), &size) != 1) {
    throw std::bad_alloc();
  }
  return digest;
}

std::optional<std::string_view> bearer_token(std::string_view authorization) {
  constexpr std::string_view kScheme = "bearer";
  if (authorization.size() <= kScheme.size()) return std::nullopt;
  for (std::size_t at = 0; at < kScheme.size(); ++at) {
    if ((authorization[at] | 0x20) != kScheme[at]) return std::nullopt;
  }
  std::string_view token = authorization.substr(kScheme.size());
  const std::size_t start = token.find_first_not_of(' ');
  if (start == 0 || start == std::string_view::npos) return std::nullopt;
  token.remove_prefix(start);
  if (token.size() > kMostTokenBytes) return std::nullopt;
  std::string_view rest = token;
  while (!rest.empty() && rest.back() == '=') rest.remove_suffix(1);
  if (rest.empty() || !std::ranges::all_of(rest, is_token_character)) return std::nullopt;
  return token;
}

std::size_t Callers::Hash::operator()(const Digest& digest) const {
  std::size_t hash = 0;
  std::memcpy(&hash, digest.data(), sizeof hash);
  return hash;
}

Callers::Callers(const CallersOptions& options, ByteBudget& in_flight)
    : options_(options),
      in_flight_(in_flight),
      secret_(random_digest()),
      last_number_(kFirstNumber) {}

Digest Callers::place_of(const Digest& digest) const {
  std::array<char, 2 * sizeof(Digest)> both;
  std::memcpy(both.data(), secret_.data(), secret_.size());
  std::memcpy(both.data() + secret_.size(), digest.data(), digest.size());
  return sha256({both.data(), both.size()});
}

std::optional<Recognized> Callers::find(const Table& table, const Digest& place,
                                        const Digest& digest) const {
  const auto found = table.find(place);
  if (found == table.end() || !equal(found->second.digest, digest)) return std::nullopt;
  const Entry& entry = found->second;
  if (entry.until > 0 && entry.until <= since_1970()) return std::nullopt;
  return entry.who;
}

std::optional<Recognized> Callers::look_up(std::string_view authorization) {
  const auto token = bearer_token(authorization);
  if (!token) return std::nullopt;
  const Digest digest = sha256(*token);
  const Digest place = place_of(digest);
  const std::shared_lock lock(mutex_);
  if (auto known = find(tokens_, place, digest)) return known;
  return find(web_tokens_, place, digest);
}

Verdict Callers::recognize(std::string_view authorization,
                           std::span<const std::string> certificate) {
  if (!authorization.empty()) {
    if (auto known = look_up(authorization)) return std::move(*known);
    const auto token = bearer_token(authorization);
    if (!token) return unauthenticated("what is no Bearer token");
    if (options_.web_tokens && looks_like_web_token(*token)) return Unchecked{*token};
    return unauthenticated("a token that it does not know");
  }
  if (certificate.empty()) return unauthenticated("nothing");
  if (auto known = by_certificate(certificate)) return std::move(*known);
  return unauthenticated("a certificate that no line names");
}

std::optional<Recognized> Callers::by_certificate(std::span<const std::string> certificate) {
  {
    const std::shared_lock lock(mutex_);
    for (const std::string& name : certificate) {
      const auto found = certificates_.find(name);
      if (found != certificates_.end()) return found->second;
    }
  }
  if (options_.certificate_roles == 0) return std::nullopt;
  const std::string name = text("certificate:", certificate.front());
  return Recognized{caller(name, name, options_.bounds), options_.certificate_roles, certified()};
}

std::optional<Roles> Callers::still(const Caller& caller, const Credential& credential,
                                    std::span<const std::string> certificate) {
  std::optional<Recognized> now;
  if (credential.kind == Credential::Kind::kCertificate) {
    now = by_certificate(certificate);
  } else {
    const std::shared_lock lock(mutex_);
    if (credential.kind == Credential::Kind::kWebToken) {
      // What it says is in the token: whoever it was is the same as long as the token is good.
      const bool good =
          credential.until > since_1970() && std::ranges::count(web_keys_, credential.key) > 0;
      return good ? std::optional(kAllRoles) : std::nullopt;
    }
    const auto found = tokens_.find(credential.place);
    if (found != tokens_.end()) now = found->second.who;
  }
  if (!now || now->caller.get() != &caller) return std::nullopt;
  return now->roles;
}

Recognized Callers::at(std::string_view address) {
  {
    const std::shared_lock lock(mutex_);
    const auto found = callers_.find(address);
    if (found != callers_.end()) return {found->second, kAllRoles};
  }
  return {caller(std::string(address), {}, options_.bounds), kAllRoles};
}

std::shared_ptr<Caller> Callers::caller(const std::string& key, const std::string& name,
                                        const Bounds& bounds) {
  const std::unique_lock lock(mutex_);
  if (callers_.size() >= kManyCallers) forget_idle();
  std::shared_ptr<Caller>& found = callers_[key];
  if (found) {
    found->set(bounds);
  } else {
    found = std::make_shared<Caller>(name, ++last_number_, in_flight_, bounds);
  }
  return found;
}

// The lock is held. Whoever is named in a table is held by it.
void Callers::forget_idle() {
  std::erase_if(callers_, [](const auto& each) {
    return each.second.use_count() == 1 && each.second->idle();
  });
}

void Callers::replace(const std::vector<Known>& known, const std::vector<std::string>& keys) {
  Table tokens;
  std::map<std::string, Recognized, std::less<>> certificates;
  for (const Known& each : known) {
    Recognized who{caller(text('@', each.name), each.name, each.bounds), each.roles, certified()};
    if (each.kind == "certificate") {
      certificates.emplace(each.value, std::move(who));
      continue;
    }
    Entry entry{{}, std::move(who), 0};
    if (each.value.size() != entry.digest.size()) throw std::runtime_error("a digest has 32 bytes");
    std::memcpy(entry.digest.data(), each.value.data(), entry.digest.size());
    const Digest place = place_of(entry.digest);
    entry.who.credential =
        std::make_shared<const Credential>(Credential{Credential::Kind::kToken, place, 0, {}});
    tokens.emplace(place, std::move(entry));
  }
  const std::unique_lock lock(mutex_);
  tokens_.swap(tokens);
  certificates_.swap(certificates);
  web_keys_ = keys;
  std::erase_if(web_tokens_, [&](const auto& each) {
    return std::ranges::count(keys, each.second.who.credential->key) == 0;
  });
}

Recognized Callers::admit(std::string_view token, const std::string& name, Roles roles,
                          double until, const std::string& key) {
  auto credential =
      std::make_shared<const Credential>(Credential{Credential::Kind::kWebToken, {}, until, key});
  Entry entry{sha256(token),
              {caller(text('@', name), name, options_.bounds), roles, std::move(credential)},
              until};
  const Digest place = place_of(entry.digest);
  const std::unique_lock lock(mutex_);
  if (web_tokens_.size() >= kMostWebTokens) {
    const double now = since_1970();
    std::erase_if(web_tokens_, [now](const auto& each) { return each.second.until <= now; });
    // All of them are good, and will be checked again when they come again.
    if (web_tokens_.size() >= kMostWebTokens) web_tokens_.clear();
  }
  const Recognized who = entry.who;
  web_tokens_.insert_or_assign(place, std::move(entry));
  return who;
}

Bounds Callers::bounds_of(std::string_view owner) const {
  Bounds bounds = options_.bounds;
  const std::shared_lock lock(mutex_);
  auto found = callers_.find(owner);  // of a line, or a web token
  if (found == callers_.end() && owner.starts_with('@')) found = callers_.find(owner.substr(1));
  if (found != callers_.end()) {
    bounds.sessions = found->second->most_sessions();
    bounds.session_bytes = found->second->most_session_bytes();
  }
  return bounds;
}

std::size_t Callers::size() const {
  const std::shared_lock lock(mutex_);
  return callers_.size();
}

}  // namespace attnserve::identity
