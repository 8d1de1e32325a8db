// The memory whose missing pages are replaced instead of ending the process: mapped ranges under
// guard (see sessions/mapping.h), and all of it while files are loaded that may be cut short.
#pragma once

#include <cstddef>

namespace attnserve {

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

// While one lives, a page that is missing in no guarded range is a page of zeros, whoever touches
// it, and whatever is loaded meanwhile is not to be used.
class FaultScope {
 public:
  FaultScope();
  ~FaultScope();
  FaultScope(const FaultScope&) = delete;
  FaultScope& operator=(const FaultScope&) = delete;

  // Whether a page was missing since this began.
  bool broken() const;

 private:
  std::size_t faults_before_;
};

}  // namespace attnserve
