#include "sessions/mapping.h"

#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "base/status.h"
#include "base/text.h"

namespace attnserve::sessions {

MappedMemory::MappedMemory(const Descriptor& object, std::size_t size) : size_(size) {
  void* start = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, object.number(), 0);
  if (start == MAP_FAILED) {
    throw RequestError(Code::kResourceExhausted,
                       text("shared memory: ", size, " bytes could not be mapped: ",
                            std::generic_category().message(errno)));
  }
  start_ = static_cast<std::byte*>(start);
}

MappedMemory::~MappedMemory() { munmap(start_, size_); }

Mapping::Mapping(Descriptor object, std::size_t size, std::string name, std::string key,
                 std::shared_ptr<ByteBudget> budget, Lease charge)
    : budget_(std::move(budget)),
      charge_(std::move(charge)),
      object_(std::move(object)),
      memory_(object_, size),
      guard_(memory_.start(), size),
      name_(std::move(name)),
      key_(std::move(key)) {}

void Mapping::check_holds(std::size_t end) const {
  struct stat found{};
  const bool known = fstat(object_.number(), &found) == 0;
  const std::size_t size = known ? static_cast<std::size_t>(found.st_size) : 0;
  if (size >= end && !guard_.broken()) return;
  const std::string left = size < end ? text("its first ", size) : "those with pages";
  throw RequestError(invalid_argument(
      text("shared_memory region ", quoted(name_)), text("bytes up to ", end, " of ", quoted(key_)),
      text(left, ": the object was truncated after it was registered")));
}

}  // namespace attnserve::sessions
