// The memory ranges whose missing pages are replaced instead of ending the process; see
// sessions/mapping.h.
#pragma once

#include <cstddef>

namespace attnserve::sessions {

// A mapped range under guard, as long as this lives. Whoever touches the range keeps it alive; it
// goes before the range is unmapped.
class FaultGuard {
 public:
  // Installs the SIGBUS handler if this is the process's first. Nothing of the range has been
  // touched yet. Throws RequestError RESOURCE_EXHAUSTED if the table is full.
  FaultGuard(std::byte* start, std::size_t size);
  ~FaultGuard();
  FaultGuard(const FaultGuard&) = delete;
  FaultGuard& operator=(const FaultGuard&) = delete;

  // Whether pages of the range were missing, and all of it is zeros since.
  bool broken() const;

 private:
  std::size_t slot_;
};

}  // namespace attnserve::sessions
