#include "engine/private_files.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <ios>
#include <sstream>
#include <stdexcept>
#include <system_error>

#include "base/text.h"

namespace attnserve::engine {
namespace {

// A line of /proc/self/maps.
struct MappedRange {
  std::byte* start = nullptr;
  std::size_t size = 0;
  std::size_t offset = 0;  // in the file
  int protection = 0;
  std::string path;
};

[[noreturn]] void fail(const std::string& path) {
  throw std::runtime_error(
      text(path, ": could not be copied: ", std::generic_category().message(errno)));
}

// Those of files in a folder, whose name is canonical.
std::vector<MappedRange> ranges_of(const std::string& folder) {
  std::ifstream maps("/proc/self/maps");
  if (!maps) throw std::runtime_error("/proc/self/maps: cannot be read");
  std::vector<MappedRange> ranges;
  for (std::string line; std::getline(maps, line);) {
    std::istringstream fields(line);
    void *start = nullptr, *end = nullptr;
    char dash = 0;
    std::string permissions, device, inode;
    MappedRange range;
    fields >> start >> dash >> end >> permissions >> std::hex >> range.offset >> device >> inode;
    std::getline(fields >> std::ws, range.path);
    if (!fields || !range.path.starts_with(folder)) continue;
    range.start = static_cast<std::byte*>(start);
    range.size = static_cast<std::size_t>(static_cast<std::byte*>(end) - range.start);
    range.protection =
        (permissions[0] == 'r' ? PROT_READ : 0) | (permissions[1] == 'w' ? PROT_WRITE : 0);
    ranges.push_back(std::move(range));
  }
  return ranges;
}

// Bytes of a mapping to where they are in the file. A page that the file no longer has is an error
// here, no signal.
void write_all(int memory, const std::byte* from, std::size_t size, std::size_t offset,
               const std::string& path) {
  while (size > 0) {
    const ssize_t written = pwrite(memory, from, size, static_cast<off_t>(offset));
    if (written <= 0) fail(path);
    const auto count = static_cast<std::size_t>(written);
    from += count;
    size -= count;
    offset += count;
  }
}

}  // namespace

PrivateFiles::~PrivateFiles() {
  for (const auto& [path, copy] : copies_) close(copy.memory);
}

void PrivateFiles::take_over(const std::filesystem::path& folder) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  for (const MappedRange& range : ranges_of(std::filesystem::canonical(folder).string() + "/")) {
    Copy& copy = copies_[range.path];
    if (copy.memory < 0) {
      copy.memory = memfd_create("attnserve-model", MFD_CLOEXEC);
      if (copy.memory < 0) fail(range.path);
    }
    const std::size_t first = range.offset / page, end = first + range.size / page;
    if (copy.written.size() < end) {
      if (ftruncate(copy.memory, static_cast<off_t>(end * page)) != 0) fail(range.path);
      copy.written.resize(end);
    }
    for (std::size_t at = first; at < end;) {
      std::size_t until = at;
      while (until < end && !copy.written[until]) copy.written[until++] = true;
      write_all(copy.memory, range.start + (at - first) * page, (until - at) * page, at * page,
                range.path);
      at = until;
      while (at < end && copy.written[at]) ++at;
    }
    // At once: whoever reads finds the old pages or the new ones, and these are equal.
    if (mmap(range.start, range.size, range.protection, MAP_PRIVATE | MAP_FIXED, copy.memory,
             static_cast<off_t>(range.offset)) == MAP_FAILED) {
      fail(range.path);
    }
  }
}

}  // namespace attnserve::engine
