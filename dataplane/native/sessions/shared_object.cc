#include "sessions/shared_object.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "base/status.h"
#include "base/text.h"

namespace attnserve::sessions {

namespace {

constexpr std::string_view kFolder = "/dev/shm";
constexpr std::string_view kKeyPattern = "/?([A-Za-z0-9_.-]{1,255})";
constexpr std::size_t kMostNamed = 256;  // characters of a wrong key that are repeated
constexpr std::size_t kMostKey = 255;    // of a file's name

bool plain(char letter) {
  return (letter >= 'a' && letter <= 'z') || (letter >= 'A' && letter <= 'Z') ||
         (letter >= '0' && letter <= '9') || letter == '_' || letter == '.' || letter == '-';
}

// The file's name of a key: no other folder, no way up, nothing that ends a path early.
std::string_view file_name(std::string_view key) {
  const std::string_view name = key.starts_with('/') ? key.substr(1) : key;
  if (name.empty() || name.size() > kMostKey || !std::ranges::all_of(name, plain) || name == "." ||
      name == "..") {
    throw RequestError(invalid_argument("key", quoted(first_characters(key, kMostNamed)),
                                        text("a name of shm_open(3), ", kKeyPattern)));
  }
  return name;
}

void check_folder() {
  struct stat found{};
  if (stat(std::string(kFolder).c_str(), &found) != 0 || !S_ISDIR(found.st_mode)) {
    throw RequestError(Code::kUnimplemented, "shared memory: this server's system has no /dev/shm");
  }
}

[[noreturn]] void refuse_unopened(std::string_view key, int error) {
  const std::string name = quoted(key);
  const std::string reason = std::generic_category().message(error);
  switch (error) {
    case ENOENT:
      throw RequestError(Code::kNotFound,
                         text("key: given ", name, "; no such shared-memory object on this host"));
    case EACCES:
    case EPERM:
      throw RequestError(Code::kPermissionDenied,
                         text("key: given ", name, ", which this server may not read and write"));
    case EMFILE:
    case ENFILE:
    case ENOMEM:
      throw RequestError(Code::kResourceExhausted,
                         text("shared memory: ", name, " could not be opened: ", reason));
    default:
      throw RequestError(invalid_argument("key", text(name, " (", reason, ")"),
                                          "a shared-memory object, no link"));
  }
}

}  // namespace

Descriptor::~Descriptor() {
  if (number_ >= 0) close(number_);
}

Descriptor open_object(std::string_view key, std::uint64_t offset, std::uint64_t byte_size) {
  const std::string path = text(kFolder, '/', file_name(key));
  check_folder();
  // O_NOFOLLOW: a link could lead out of the folder. O_NONBLOCK: opening a pipe would wait.
  Descriptor object(open(path.c_str(), O_RDWR | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK));
  struct stat found{};
  if (object.number() < 0 || fstat(object.number(), &found) != 0) refuse_unopened(key, errno);
  if (!S_ISREG(found.st_mode)) {
    throw RequestError(invalid_argument("key", quoted(key), "a shared-memory object"));
  }
  if (found.st_uid != geteuid()) {
    throw RequestError(Code::kPermissionDenied,
                       text("key: given ", quoted(key), ", an object of user ", found.st_uid,
                            "; allowed: those of user ", geteuid(), ", whom this server runs as"));
  }
  const auto size = static_cast<std::uint64_t>(found.st_size);
  if (offset > size || byte_size > size - offset) {
    throw RequestError(invalid_argument("offset and byte_size", text(offset, " and ", byte_size),
                                        text("parts of the ", size, " bytes of ", quoted(key))));
  }
  return object;
}

void claim_pages(const Descriptor& object, std::string_view key, std::uint64_t offset,
                 std::uint64_t byte_size) {
  int failed = 0;
  do {
    failed = fallocate(object.number(), FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                       static_cast<off_t>(byte_size)) == 0
                 ? 0
                 : errno;
  } while (failed == EINTR);
  // A /dev/shm that is no tmpfs may not know how; the mapping copes with missing pages either way.
  if (failed == 0 || failed == EOPNOTSUPP || failed == ENOSYS) return;
  if (failed == ENOSPC || failed == ENOMEM) {
    throw RequestError(Code::kResourceExhausted,
                       text("shared memory: ", byte_size, " bytes of ", quoted(key),
                            " were asked for; /dev/shm has no room for them"));
  }
  refuse_unopened(key, failed);
}

}  // namespace attnserve::sessions
