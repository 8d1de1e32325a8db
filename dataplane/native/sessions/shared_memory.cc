#include "sessions/shared_memory.h"

#include <arpa/inet.h>
#include <netinet/in.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "base/random.h"
#include "base/status.h"
#include "base/text.h"
#include "sessions/mapping.h"
#include "sessions/shared_object.h"

namespace attnserve::sessions {

namespace {

constexpr std::size_t kMostName = 256;  // characters of a region's name
constexpr std::size_t kNameBytes = 16;  // random ones, of a private region's name

// Closed connections that are remembered: a region that is being made while its connection closes
// must not outlive it. Making one takes less time than so many connections take to close.
constexpr std::size_t kMostClosed = 4096;
constexpr std::uint64_t kNoConnection = std::numeric_limits<std::uint64_t>::max();

// Nobody knows when others unregister; a refusal without retry-after would be for good.
constexpr std::chrono::seconds kRoomRetry{1};

[[noreturn]] void refuse_unknown(std::string_view name) {
  throw RequestError(Code::kNotFound,
                     text("shared_memory region: given ", quoted(first_characters(name, kMostName)),
                          "; allowed: a registered one"));
}

[[noreturn]] void refuse_closed() {
  throw RequestError(Code::kCancelled, "shared memory: the caller's connection has closed");
}

void check_name(std::string_view name) {
  std::size_t characters = 0;
  for (std::size_t at = 0; at < name.size(); ++characters) at += character_at(name, at).bytes;
  if (characters >= 1 && characters <= kMostName) return;
  throw RequestError(invalid_argument("name", text(characters, " characters"),
                                      text("1..", kMostName, " characters")));
}

// What %XX stand for; other text as it is.
std::string percent_decoded(std::string_view text) {
  const auto digit = [](char letter) {
    constexpr std::string_view kDigits = "0123456789abcdef";
    const char lower = letter >= 'A' && letter <= 'F' ? static_cast<char>(letter + 32) : letter;
    return kDigits.find(lower);
  };
  std::string decoded;
  for (std::size_t at = 0; at < text.size(); ++at) {
    if (text[at] == '%' && at + 2 < text.size()) {
      const std::size_t high = digit(text[at + 1]), low = digit(text[at + 2]);
      if (high != std::string_view::npos && low != std::string_view::npos) {
        decoded += static_cast<char>(high * 16 + low);
        at += 2;
        continue;
      }
    }
    decoded += text[at];
  }
  return decoded;
}

std::optional<std::string> loopback_v4(const in_addr& address) {
  if (ntohl(address.s_addr) >> 24 != 127) return std::nullopt;
  std::array<char, INET_ADDRSTRLEN> written{};
  inet_ntop(AF_INET, &address, written.data(), written.size());
  return written.data();
}

// The address of a host on loopback, as it is usually written; IPv4 within IPv6 as IPv4.
std::optional<std::string> loopback(const std::string& host) {
  in_addr v4{};
  if (inet_pton(AF_INET, host.c_str(), &v4) == 1) return loopback_v4(v4);
  in6_addr v6{};
  if (inet_pton(AF_INET6, host.c_str(), &v6) != 1) return std::nullopt;
  if (IN6_IS_ADDR_V4MAPPED(&v6)) {
    std::memcpy(&v4, &v6.s6_addr[12], sizeof v4);
    return loopback_v4(v4);
  }
  if (IN6_IS_ADDR_LOOPBACK(&v6)) return "::1";
  return std::nullopt;
}

}  // namespace

struct SharedRegions::Region {
  RegionStatus status;
  bool named;                        // by its caller; else private
  std::uint64_t connection;          // of a private one
  std::shared_ptr<Mapping> mapping;  // nullptr while its pages are being claimed
};

struct SharedRegions::State {
  // By owner and name. The pointer tells a region from a later one of the same name.
  using Regions = std::map<std::pair<std::string, std::string>, std::shared_ptr<Region>>;

  State(std::size_t most_regions, std::size_t most_bytes)
      : max_regions(most_regions), budget(std::make_shared<ByteBudget>(most_bytes)) {
    closed.fill(kNoConnection);
  }

  const std::size_t max_regions;
  const std::shared_ptr<ByteBudget> budget;  // of mapped bytes; mappings in use keep it

  mutable std::mutex mutex;  // guards all below, and the mappings of regions
  Regions regions;
  std::array<std::uint64_t, kMostClosed> closed;  // connections
  std::size_t next_closed = 0;                    // whose place the next one to close takes

  bool has_closed(std::uint64_t connection) const {
    return std::ranges::find(closed, connection) != closed.end();
  }

  // Moves regions into `gone`, to be unmapped once the lock is free: that takes a while. Allocates
  // nothing, since connections close when memory is short, too.
  template <class Condition>
  void take_out(const Condition& condition, Regions& gone) {
    for (auto at = regions.begin(); at != regions.end();) {
      const auto next = std::next(at);
      if (condition(at->first.first, *at->second)) gone.insert(regions.extract(at));
      at = next;
    }
  }

  // Takes a place for a region, so that the limits hold while it is made, and charges `charge`.
  void reserve(const std::string& owner, const std::shared_ptr<Region>& region, std::size_t size,
               Lease& charge) {
    const std::scoped_lock lock(mutex);
    if (!region->named && has_closed(region->connection)) refuse_closed();
    const std::pair at(owner, region->status.name);
    if (regions.contains(at)) {
      throw RequestError(Code::kAlreadyExists, text("name: given ", quoted(region->status.name),
                                                    ", which is registered; allowed: others"));
    }
    if (regions.size() >= max_regions) {
      const auto retry = max_regions > 0 ? kRoomRetry : std::chrono::seconds{0};
      throw RequestError(
          {Code::kResourceExhausted,
           text("shared-memory regions: ", regions.size(),
                " are registered; allowed: ", max_regions, " (--max-shared-regions)"),
           retry});
    }
    if (!charge.grow(size)) {
      const auto retry = size <= budget->total() ? kRoomRetry : std::chrono::seconds{0};
      throw RequestError(
          {Code::kResourceExhausted,
           text("shared memory: ", budget->lent(), " bytes are mapped and ", size,
                " more were asked for; allowed: ", budget->total(), " (--max-shared-mib)"),
           retry});
    }
    regions.emplace(at, region);
  }

  void abandon(const std::string& owner, const std::shared_ptr<Region>& region) {
    const std::scoped_lock lock(mutex);
    const auto found = regions.find({owner, region->status.name});
    if (found != regions.end() && found->second == region) regions.erase(found);
  }
};

void RegionView::check_intact() const {
  if (!mapping) return;
  const auto end = bytes.data() + bytes.size() - mapping->data();
  mapping->check_holds(static_cast<std::size_t>(end));
}

std::string_view name_of_caller(std::string_view peer) {
  const std::size_t at = peer.find('@');
  return at == std::string_view::npos ? std::string_view{} : peer.substr(at);
}

std::string_view address_of(std::string_view peer) {
  if (const std::string_view name = name_of_caller(peer); !name.empty()) return name;
  if (!peer.starts_with("ipv4:") && !peer.starts_with("ipv6:")) return peer;
  return peer.substr(0, peer.rfind(':'));
}

std::string owner_of(std::string_view peer) {
  const std::string_view name = name_of_caller(peer);
  if (!name.empty()) return owner_of(peer.substr(0, peer.size() - name.size())).append(name);
  const std::string_view kind = peer.substr(0, peer.find(':'));
  if (kind.size() < peer.size()) {
    if (kind == "unix" || kind == "unix-abstract") return "unix";
    if (kind == "ipv4" || kind == "ipv6") {
      std::string host = percent_decoded(peer.substr(kind.size() + 1));
      host.erase(host.find(':') == std::string::npos ? 0 : host.rfind(':'));  // the port
      if (host.starts_with('[') && host.ends_with(']')) host = host.substr(1, host.size() - 2);
      if (std::optional<std::string> owner = loopback(host)) return *owner;
    }
  }
  throw RequestError(Code::kPermissionDenied,
                     text("shared memory: given by a caller at ", peer,
                          "; allowed: callers on this host, over loopback or a Unix socket"));
}

SharedRegions::SharedRegions(std::size_t max_regions, std::size_t max_bytes)
    : state_(std::make_unique<State>(max_regions, max_bytes)) {}

SharedRegions::~SharedRegions() = default;

void SharedRegions::add(std::string_view name, std::string_view key, std::uint64_t offset,
                        std::uint64_t byte_size, const std::string& owner) {
  check_name(name);
  add_region({std::string(name), std::string(key), offset, byte_size}, owner, true, 0);
}

std::string SharedRegions::add_private(std::string_view key, std::uint64_t byte_size,
                                       const std::string& owner, std::uint64_t connection) {
  std::string name = random_hex(kNameBytes);
  add_region({name, std::string(key), 0, byte_size}, owner, false, connection);
  return name;
}

void SharedRegions::add_region(RegionStatus status, const std::string& owner, bool named,
                               std::uint64_t connection) {
  if (status.byte_size < 1) {
    throw RequestError(invalid_argument("byte_size", text(status.byte_size), "1 or more"));
  }
  Descriptor object = open_object(status.key, status.offset, status.byte_size);
  const std::size_t end = status.offset + status.byte_size;  // at most the object's size
  const auto region =
      std::make_shared<Region>(Region{std::move(status), named, connection, nullptr});
  const RegionStatus& part = region->status;
  Lease charge(*state_->budget);
  state_->reserve(owner, region, end, charge);
  try {
    claim_pages(object, part.key, part.offset, part.byte_size);
    auto mapping = std::make_shared<Mapping>(std::move(object), end, part.name, part.key,
                                             state_->budget, std::move(charge));
    const std::scoped_lock lock(state_->mutex);
    if (!named && state_->has_closed(connection)) refuse_closed();
    region->mapping =
        std::move(mapping);  // and goes with `region` if that was unregistered meanwhile
  } catch (...) {
    state_->abandon(owner, region);
    throw;
  }
}

void SharedRegions::remove(std::string_view name, const std::string& owner) {
  std::shared_ptr<Region> gone;
  const std::scoped_lock lock(state_->mutex);
  const auto found = state_->regions.find({owner, std::string(name)});
  if (found == state_->regions.end()) refuse_unknown(name);
  gone = std::move(found->second);
  state_->regions.erase(found);
}

void SharedRegions::remove_all(const std::string& owner) {
  State::Regions gone;
  const std::scoped_lock lock(state_->mutex);
  state_->take_out([&](const std::string& whose,
                       const Region& region) { return whose == owner && region.named; },
                   gone);
}

void SharedRegions::connection_closed(std::uint64_t connection) {
  State::Regions gone;
  const std::scoped_lock lock(state_->mutex);
  state_->closed[state_->next_closed] = connection;
  state_->next_closed = (state_->next_closed + 1) % kMostClosed;
  state_->take_out(
      [&](const std::string&, const Region& region) {
        return !region.named && region.connection == connection;
      },
      gone);
}

std::vector<RegionStatus> SharedRegions::status(std::string_view name,
                                                const std::string& owner) const {
  std::vector<RegionStatus> found;
  const std::scoped_lock lock(state_->mutex);
  for (const auto& [at, region] : state_->regions) {
    const bool asked = name.empty() || name == region->status.name;
    if (at.first == owner && region->named && region->mapping && asked) {
      found.push_back(region->status);
    }
  }
  if (!name.empty() && found.empty()) refuse_unknown(name);
  return found;
}

RegionView SharedRegions::view(std::string_view name, std::uint64_t offset, std::uint64_t byte_size,
                               const std::string& owner) const {
  std::shared_ptr<Region> region;
  std::shared_ptr<Mapping> mapping;
  {
    const std::scoped_lock lock(state_->mutex);
    const auto found = state_->regions.find({owner, std::string(name)});
    if (found == state_->regions.end() || !found->second->mapping) refuse_unknown(name);
    region = found->second;
    mapping = region->mapping;
  }
  const RegionStatus& within = region->status;
  if (byte_size < 1 || offset > within.byte_size || byte_size > within.byte_size - offset) {
    throw RequestError(invalid_argument(text("shared_memory region ", quoted(name)),
                                        text("offset ", offset, " and ", byte_size, " bytes"),
                                        text("1 or more of its ", within.byte_size, " bytes")));
  }
  const std::size_t start = within.offset + offset;
  mapping->check_holds(start + byte_size);
  return {{mapping->data() + start, byte_size}, std::move(mapping)};
}

std::size_t SharedRegions::mapped_bytes() const { return state_->budget->lent(); }

}  // namespace attnserve::sessions
