// Sessions that leave for other servers, and who waits to be told where they are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/memory.h"
#include "sessions/kv_departure.h"

namespace attnserve::services {

struct Core;

// Requests that name a session on its way, which are answered once it is known where it is. Any
// thread.
class Departures {
 public:
  void wait(const std::string& session_id, std::function<void()> known);
  // It has moved, or stays: calls what waits for it.
  void known(const std::string& session_id);

 private:
  std::mutex mutex_;  // guards what follows
  std::unordered_multimap<std::string, std::function<void()>> waiting_;
};

// One session while it is copied to another server. Let go before `moved`: it stays, and whoever
// waits for it is told that this server shuts down. One thread at a time; the core outlives it.
class Departure {
 public:
  // See KvSessions::depart. Nothing: something of the session is under way still.
  static std::unique_ptr<Departure> begin(Core& core, const std::string& session_id);
  // The session stays, though something of it was under way: who asked for it meanwhile is told.
  static void give_up(Core& core, const std::string& session_id);

  Departure(Core& core, std::string session_id, sessions::KvDeparture session);
  ~Departure();
  Departure(const Departure&) = delete;
  Departure& operator=(const Departure&) = delete;

  const sessions::KvDeparture& session() const { return *session_; }  // until `moved`
  Bytes next();  // its next chunk; none after the last
  bool ended() const { return session_->ended(); }
  void again() { session_->again(); }  // from the first chunk
  // Tells the stream that used it last, and whoever waits for it.
  void moved(const std::string& address, const std::string& authority,
             const std::string& new_session_id);

 private:
  Core& core_;
  const std::string session_id_;
  std::unique_ptr<sessions::KvDeparture> session_;
};

}  // namespace attnserve::services
