// A shared-memory object in the server's address space, and what happens when pages of it are
// missing.
//
// Whoever made an object may truncate it at any time, and touching a page that was cut off raises
// SIGBUS. (Seals such as F_SEAL_SHRINK exist for memfd_create only.) So the first mapping of a
// process installs a handler: if the address lies in a mapping of ours, it puts zero pages in place
// of all of that mapping, notes that the mapping is broken, and lets the thread go on; any other
// SIGBUS goes to the handler that was there before, or ends the process as it would have. Threads
// that use mappings must not block SIGBUS.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "base/fault_table.h"
#include "base/memory.h"
#include "sessions/shared_object.h"

namespace attnserve::sessions {

// Memory that is mapped, and unmapped on destruction.
class MappedMemory {
 public:
  // The first `size` bytes of an object, readable and writable. Throws RequestError
  // RESOURCE_EXHAUSTED.
  MappedMemory(const Descriptor& object, std::size_t size);
  ~MappedMemory();
  MappedMemory(const MappedMemory&) = delete;
  MappedMemory& operator=(const MappedMemory&) = delete;
  std::byte* start() const { return start_; }

 private:
  std::byte* start_;
  std::size_t size_;
};

class Mapping {
 public:
  // The first `size` bytes of an object. `name` (the region's) and `key` are for messages. `charge`
  // is of `budget`, and given back once the memory is unmapped. Throws RequestError
  // RESOURCE_EXHAUSTED.
  Mapping(Descriptor object, std::size_t size, std::string name, std::string key,
          std::shared_ptr<ByteBudget> budget, Lease charge);

  std::byte* data() const { return memory_.start(); }
  // Throws RequestError INVALID_ARGUMENT unless the object has its first `end` bytes now and no
  // page was ever found missing.
  void check_holds(std::size_t end) const;

 private:
  // Destroyed from the last to the first: out of the handler's table, unmapped, closed, given back.
  std::shared_ptr<ByteBudget> budget_;
  Lease charge_;
  Descriptor object_;  // open as long as the mapping, to ask for the object's size
  MappedMemory memory_;
  FaultGuard guard_;
  std::string name_, key_;
};

}  // namespace attnserve::sessions
