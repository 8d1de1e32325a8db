// Tensors that stay in the server between requests, each for as long as its lease lasts.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
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
  std::string handle;  // 128 random bits, URL-safe base64
  std::chrono::microseconds lease{0};
  std::size_t byte_size = 0;
};

class StoredTensors;

// Room in the store for one tensor, claimed as its bytes come; given back unless it was stored. The
// store outlives it. Owned by one thread at a time.
class Room {
 public:
  Room(Room&& other) noexcept;
  Room& operator=(Room&& other) noexcept;
  ~Room();
  // Throws RequestError RESOURCE_EXHAUSTED, and has claimed nothing, if there is no room; with
  // retry_after unless the tensor could never fit.
  void claim(std::size_t more);

 private:
  friend class StoredTensors;
  Room(StoredTensors& store, ByteBudget* part)
      : store_(&store),
        part_(part != nullptr ? Lease(*part) : Lease()),
        has_part_(part != nullptr) {}

  StoredTensors* store_;
  std::size_t size_ = 0;
  Lease part_;  // the same of the caller's own
  bool has_part_ = false;
};

// Any thread. Every call first forgets what has run out.
//
// `owner` is the name of the caller, empty where callers have none; a tensor that another owner
// stored is NOT_FOUND. Among those without a name, knowing the handle is the permission.
class StoredTensors {
 public:
  // All tensors together have at most `max_bytes`. A lease is what a caller asks for, the default
  // if that is not above zero, and never longer than `max_lease`.
  StoredTensors(std::size_t max_bytes, Duration default_lease, Duration max_lease);
  ~StoredTensors();

  // `part`: what one caller's tensors may take, which outlives them; nullptr: no bound of its own.
  Room begin(ByteBudget* part = nullptr) { return Room(*this, part); }
  // Refuses at once what could never fit, or would not fit now: as Room::claim, without claiming,
  // but for the caller's own part.
  void check_fits(std::size_t byte_size);
  // Keeps a tensor. Claims what its room has not got yet: throws as Room::claim does.
  Stored put(StoredTensor tensor, Room room, Duration lease, std::string_view owner);
  // Starts the lease anew. `field` is what the handle came in, for messages. Throws RequestError
  // NOT_FOUND: never put, another's, dropped, or run out; INVALID_ARGUMENT: the handle is empty.
  StoredTensorPtr get(std::string_view handle, std::string_view owner, std::string_view field);
  // Starts the lease anew, with another length if that is above zero. Throws as `get`.
  Stored renew(std::string_view handle, std::string_view owner, Duration lease);
  // Requests that use the tensor now still end well. Throws as `get`.
  void drop(std::string_view handle, std::string_view owner);
  std::size_t bytes();  // kept, or claimed by what is arriving

 private:
  friend class Room;
  struct State;
  std::unique_ptr<State> state_;
};

// The tensors that a request may name. Views both.
struct StoredOf {
  StoredTensors& store;
  std::string_view owner;
};

}  // namespace attnserve::sessions
