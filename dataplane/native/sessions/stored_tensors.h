// Tensors that stay in the server between requests, each for as long as its lease lasts.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "base/clock.h"
#include "base/memory.h"
#include "base/tensor.h"

namespace attnserve::sessions {

// Immutable once stored; requests that use it keep it alive past its lease.
struct StoredTensor {
  DataType dtype = DataType::kUnspecified;
  Shape shape;
  Bytes elements;
};
using StoredTensorPtr = std::shared_ptr<const StoredTensor>;

struct Stored {
  std::string handle;         // 128 random bits, URL-safe base64: knowing it is the permission
  std::chrono::microseconds lease;
  std::size_t byte_size = 0;
};

class StoredTensors;

// Room in the store for one tensor, claimed as its bytes come; given back unless it was stored.
class Room {
 public:
  Room(Room&&) noexcept;
  Room& operator=(Room&&) noexcept;
  ~Room();
  void claim(std::size_t more);   // throws RequestError RESOURCE_EXHAUSTED with retry_after
 private:
  friend class StoredTensors;
  explicit Room(StoredTensors& store) : store_(&store) {}
  StoredTensors* store_;
  std::size_t size_ = 0;
};

// Messages as in server/src/attnserve_server/kept_tensors.py. Any thread.
class StoredTensors {
 public:
  StoredTensors(std::size_t max_bytes, Duration default_lease, Duration max_lease);
  Room begin() { return Room(*this); }
  // Refuses at once what could never fit, or would not fit now: as Room::claim, without claiming.
  void check_fits(std::size_t byte_size);
  Stored put(StoredTensor tensor, Room room, Duration lease);   // zero: the default lease
  // Starts the lease anew. `field` for messages. Throws RequestError NOT_FOUND.
  StoredTensorPtr get(std::string_view handle, std::string_view field);
  Stored renew(std::string_view handle, Duration lease);
  void drop(std::string_view handle);
  std::size_t bytes();   // kept, or claimed by what is arriving

 private:
  friend class Room;
  struct Entry;
  // ... mutex-guarded map by handle; see stored_tensors.cc
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace attnserve::sessions
