// What callers' uploads under way hold of a bound that all callers share: no caller holds it all.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <string>
#include <string_view>

namespace attnserve::sessions {

class Upload;

// Any thread. Outlives every Upload. An upload is what comes in several messages: until its last
// one has come it is under way, and nobody else's.
class Uploads {
 public:
  // `total`: bytes; `option`: what sets it, for messages. One caller's uploads together hold at
  // most half of it. A single one may hold more, until another caller lacks room.
  Uploads(std::size_t total, std::string option);

  // `peer` as CallInfo has it: callers are told apart by their addresses, without the port.
  Upload begin(std::string_view peer);

 private:
  friend class Upload;
  struct Caller {
    std::size_t uploads = 0;
    std::size_t bytes = 0;
    bool crowds_others = false;  // it held more than its share, and another lacked room
  };
  using Callers = std::map<std::string, Caller, std::less<>>;  // those with uploads under way

  void check(const Caller& caller, std::size_t more) const;

  const std::size_t share_;
  const std::string option_;
  std::mutex mutex_;  // guards what follows, and what callers hold
  Callers callers_;
};

// One upload's bytes; given back on destruction. An empty one holds none. Owned by one thread at a
// time.
class Upload {
 public:
  Upload() = default;
  Upload(Upload&& other) noexcept;
  Upload& operator=(Upload&& other) noexcept;
  ~Upload();

  // Throws RequestError RESOURCE_EXHAUSTED with retry_after, and holds no more, if that would be
  // beyond its caller's share.
  void take(std::size_t more);
  // All was taken when this upload needed some: from now on others are held to their shares.
  void lacks_room();

 private:
  friend class Uploads;
  Upload(Uploads& uploads, Uploads::Callers::iterator caller)
      : uploads_(&uploads), caller_(caller) {}

  Uploads* uploads_ = nullptr;
  Uploads::Callers::iterator caller_;
  std::size_t bytes_ = 0;
};

}  // namespace attnserve::sessions
