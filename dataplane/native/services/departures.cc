#include "services/departures.h"

#include <utility>

#include "services/core.h"
#include "wire/kv_sessions.h"

namespace attnserve::services {

void Departures::wait(const std::string& session_id, std::function<void()> known) {
  const std::lock_guard lock(mutex_);
  waiting_.emplace(session_id, std::move(known));
}

void Departures::known(const std::string& session_id) {
  std::vector<std::function<void()>> told;
  {
    const std::lock_guard lock(mutex_);
    const auto [first, last] = waiting_.equal_range(session_id);
    for (auto at = first; at != last; ++at) told.push_back(std::move(at->second));
    waiting_.erase(first, last);
  }
  for (const auto& each : told) each();
}

std::unique_ptr<Departure> Departure::begin(Core& core, const std::string& session_id) {
  auto session = core.kv.depart(session_id);
  if (!session) return nullptr;
  return std::make_unique<Departure>(core, session_id, std::move(*session));
}

void Departure::give_up(Core& core, const std::string& session_id) {
  core.kv.stay(session_id);
  core.departures.known(session_id);
}

Departure::Departure(Core& core, std::string session_id, sessions::KvDeparture session)
    : core_(core),
      session_id_(std::move(session_id)),
      session_(std::make_unique<sessions::KvDeparture>(std::move(session))) {}

Departure::~Departure() {
  session_.reset();
  core_.departures.known(session_id_);
}

Bytes Departure::next() { return session_->next(core_.limits.chunk_bytes); }

void Departure::moved(const std::string& address, const std::string& authority,
                      const std::string& new_session_id) {
  const std::uint64_t length = session_->length();
  const std::uint64_t stream = session_->moved({address, authority, new_session_id, 0});
  session_.reset();
  core_.streams.tell(stream,
                     wire::encode_moved({session_id_, address, authority, new_session_id, length}));
  core_.departures.known(session_id_);
}

}  // namespace attnserve::services
