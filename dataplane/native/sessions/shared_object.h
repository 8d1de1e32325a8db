// Opening what shm_open(3) makes, for a caller who names it. Linux keeps such objects as files
// under /dev/shm, so that is where they are opened.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

namespace attnserve::sessions {

// An open file; closed on destruction.
class Descriptor {
 public:
  explicit Descriptor(int number) : number_(number) {}
  Descriptor(Descriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(number_, other.number_);
    return *this;
  }
  ~Descriptor();
  int number() const { return number_; }

 private:
  int number_;
};

// The object `key`, read and write, whose bytes [offset, offset + byte_size) exist. Throws
// RequestError: INVALID_ARGUMENT, NOT_FOUND, PERMISSION_DENIED, UNIMPLEMENTED as
// SharedRegions::add says; RESOURCE_EXHAUSTED, no descriptor is left.
Descriptor open_object(std::string_view key, std::uint64_t offset, std::uint64_t byte_size);

// Gives those bytes pages now, so that none is found missing when a kernel touches it. Leaves the
// object's size and contents as they are. Throws RequestError RESOURCE_EXHAUSTED if /dev/shm is
// full.
void claim_pages(const Descriptor& object, std::string_view key, std::uint64_t offset,
                 std::uint64_t byte_size);

}  // namespace attnserve::sessions
