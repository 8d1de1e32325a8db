#include <doctest/doctest.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>
#include <vector>

#include "base/random.h"
#include "base/status.h"
#include "base/text.h"
#include "sessions/shared_memory.h"

using namespace attnserve;
using namespace attnserve::sessions;
namespace fs = std::filesystem;

namespace {

constexpr std::size_t kPage = 4096;
const std::string kHere = "127.0.0.1", kThere = "::1";

// An object of some pages whose bytes count 0, 1, ... 255, 0 and so on.
struct Object {
  std::string key = "attnserve-test-" + random_hex(8);
  fs::path path = fs::path("/dev/shm") / key;

  explicit Object(std::size_t size = 2 * kPage) {
    std::string content(size, '\0');
    for (std::size_t at = 0; at < size; ++at) content[at] = static_cast<char>(at % 256);
    std::ofstream(path, std::ios::binary) << content;
  }
  ~Object() {
    std::error_code ignored;
    fs::remove(path, ignored);
  }
  void truncate(std::size_t size) const { fs::resize_file(path, size); }
};

int byte_at(const RegionView& view, std::size_t at) {
  return std::to_integer<int>(reinterpret_cast<volatile std::byte*>(view.bytes.data())[at]);
}

template <class Step>
Status refusal(const Step& step) {
  try {
    step();
  } catch (const RequestError& error) {
    return error.status();
  }
  return {};
}

bool contains(const std::string& whole, std::string_view part) {
  return whole.find(part) != std::string::npos;
}

// How a child process that runs `step` ends.
template <class Step>
int end_of_child(const Step& step) {
  const pid_t child = fork();
  if (child == 0) {
    dup2(open("/dev/null", O_WRONLY), STDERR_FILENO);  // a sanitizer has much to say of such an end
    step();
    _exit(0);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  return status;
}

}  // namespace

TEST_CASE("callers with names are told apart by them, and must be local all the same") {
  CHECK(owner_of("ipv4:127.0.0.1:4242@a") == "127.0.0.1@a");
  CHECK(owner_of("unix:@b") == "unix@b");
  CHECK(owner_of("unix:@certificate:b@c") == "unix@certificate:b@c");
  CHECK_THROWS_AS(owner_of("ipv4:10.0.0.1:4242@a"), RequestError);
  CHECK(address_of("ipv4:10.0.0.1:4242@a") == "@a");
  CHECK(address_of("ipv4:10.0.0.1:4242") == "ipv4:10.0.0.1");
}

TEST_CASE("what is written is seen by both sides") {
  const Object object;
  SharedRegions regions(3, 8 * kPage);
  regions.add("a", "/" + object.key, 100, kPage, kHere);
  const RegionView view = regions.view("a", 5, 20, kHere);
  CHECK(view.bytes.size() == 20);
  CHECK(byte_at(view, 0) == 105);
  CHECK(byte_at(view, 19) == 124);
  view.bytes[0] = std::byte{'x'};
  std::ifstream file(object.path, std::ios::binary);
  file.seekg(105);
  CHECK(file.get() == 'x');
  view.check_intact();
}

TEST_CASE("a view stays within its region") {
  const Object object;
  SharedRegions regions(3, 8 * kPage);
  regions.add("a", object.key, 0, kPage, kHere);
  constexpr std::uint64_t kHuge = std::uint64_t{1} << 63;
  const std::vector<std::pair<std::uint64_t, std::uint64_t>> wrong{
      {0, 0}, {0, kPage + 1}, {kPage, 1}, {1, kPage}, {kHuge, 1}, {kHuge, kHuge}, {~0ULL, ~0ULL}};
  for (const auto& part : wrong) {
    const std::uint64_t offset = part.first, byte_size = part.second;
    const Status status = refusal([&] { regions.view("a", offset, byte_size, kHere); });
    CHECK(status.code == Code::kInvalidArgument);
    CHECK(status.message == text("shared_memory region 'a': given offset ", offset, " and ",
                                 byte_size, " bytes; allowed: 1 or more of its 4096 bytes"));
  }
}

TEST_CASE("a region stays within its object, and sizes make sense") {
  const Object object;
  SharedRegions regions(3, 8 * kPage);
  const std::vector<std::pair<std::uint64_t, std::uint64_t>> wrong{
      {0, 2 * kPage + 1}, {2 * kPage, 1}, {1, 2 * kPage}, {1ULL << 62, 1}, {~0ULL, 2}};
  for (const auto& part : wrong) {
    const std::uint64_t offset = part.first, byte_size = part.second;
    const Status status = refusal([&] { regions.add("a", object.key, offset, byte_size, kHere); });
    CHECK(status.code == Code::kInvalidArgument);
    CHECK(status.message == text("offset and byte_size: given ", offset, " and ", byte_size,
                                 "; allowed: parts of the 8192 bytes of '", object.key, "'"));
  }
  CHECK(refusal([&] { regions.add("a", object.key, 0, 0, kHere); }).message ==
        "byte_size: given 0; allowed: 1 or more");
  CHECK(regions.mapped_bytes() == 0);
}

TEST_CASE("keys are plain names") {
  SharedRegions regions(3, 8 * kPage);
  using namespace std::string_literals;
  for (const std::string& key : {""s, "/"s, "."s, ".."s, "/.."s, "../x"s, "a/b"s, "//a"s, "a\0b"s,
                                 "ä"s, "a b"s, std::string(256, 'x')}) {
    const Status status = refusal([&] { regions.add("a", key, 0, 1, kHere); });
    CHECK(status.code == Code::kInvalidArgument);
    CHECK(status.message == text("key: given ", attnserve::quoted(key),
                                 "; allowed: a name of shm_open(3), /?([A-Za-z0-9_.-]{1,255})"));
  }
}

TEST_CASE("names have some characters") {
  const Object object;
  SharedRegions regions(3, 8 * kPage);
  CHECK(refusal([&] { regions.add("", object.key, 0, 1, kHere); }).message ==
        "name: given 0 characters; allowed: 1..256 characters");
  CHECK(refusal([&] { regions.add(std::string(257, 'n'), object.key, 0, 1, kHere); }).message ==
        "name: given 257 characters; allowed: 1..256 characters");
  std::string wide;
  for (int count = 0; count < 256; ++count) wide += "語";
  regions.add(wide, object.key, 0, 1, kHere);
}

TEST_CASE("only real objects are opened") {
  const Object object;
  SharedRegions regions(3, 8 * kPage);
  const Status missing = refusal([&] { regions.add("a", object.key + "-not", 0, 1, kHere); });
  CHECK(missing.code == Code::kNotFound);
  CHECK(missing.message ==
        text("key: given '", object.key, "-not'; no such shared-memory object on this host"));
  const std::string key = object.key + "-other";
  const fs::path path = fs::path("/dev/shm") / key;
  const auto given = [&] { return refusal([&] { regions.add("a", key, 0, 1, kHere); }); };
  fs::create_symlink(object.path, path);
  CHECK(given().message == text("key: given '", key,
                                "' (Too many levels of symbolic links); allowed: a shared-memory "
                                "object, no link"));
  fs::remove(path);
  fs::create_directory(path);
  CHECK(given().code == Code::kInvalidArgument);
  fs::remove(path);
  REQUIRE(mkfifo(path.c_str(), 0600) == 0);
  CHECK(given().message == text("key: given '", key, "'; allowed: a shared-memory object"));
  fs::remove(path);
}

TEST_CASE("objects of other users are refused") {
  const Object object;
  if (geteuid() != 0) return;  // nobody else can give a file away
  REQUIRE(chown(object.path.c_str(), 12345, static_cast<gid_t>(-1)) == 0);
  SharedRegions regions(3, 8 * kPage);
  const Status status = refusal([&] { regions.add("a", object.key, 0, 1, kHere); });
  CHECK(status.code == Code::kPermissionDenied);
  CHECK(status.message == text("key: given '", object.key,
                               "', an object of user 12345; allowed: those of user 0, whom this "
                               "server runs as"));
}

TEST_CASE("owners do not see each other's regions") {
  const Object object;
  SharedRegions regions(3, 8 * kPage);
  regions.add("a", object.key, 0, 10, kHere);
  regions.add("a", object.key, 4, 20, kThere);
  const Status taken = refusal([&] { regions.add("a", object.key, 0, 1, kHere); });
  CHECK(taken.code == Code::kAlreadyExists);
  CHECK(taken.message == "name: given 'a', which is registered; allowed: others");
  CHECK(byte_at(regions.view("a", 0, 1, kThere), 0) == 4);
  REQUIRE(regions.status("", kHere).size() == 1);
  CHECK(regions.status("a", kHere)[0].byte_size == 10);
  regions.remove("a", kHere);
  const Status unknown = refusal([&] { regions.view("a", 0, 1, kHere); });
  CHECK(unknown.code == Code::kNotFound);
  CHECK(unknown.message == "shared_memory region: given 'a'; allowed: a registered one");
  CHECK(refusal([&] { regions.remove("a", kHere); }).code == Code::kNotFound);
  CHECK(refusal([&] { regions.status("a", kHere); }).code == Code::kNotFound);
  CHECK(regions.status("", kHere).empty());
  regions.view("a", 0, 1, kThere);
}

TEST_CASE("private regions are known by their name alone") {
  const Object object;
  SharedRegions regions(3, 8 * kPage);
  const std::string name = regions.add_private(object.key, kPage, kHere, 1);
  CHECK(name.size() == 32);
  CHECK(name != regions.add_private(object.key, kPage, kHere, 1));
  CHECK(regions.status("", kHere).empty());
  CHECK(refusal([&] { regions.status(name, kHere); }).code == Code::kNotFound);
  regions.remove_all(kHere);
  CHECK(regions.view(name, 0, kPage, kHere).bytes.size() == kPage);
  CHECK(refusal([&] { regions.view(name, 0, 1, kThere); }).code == Code::kNotFound);
  regions.remove(name, kHere);
  CHECK(refusal([&] { regions.view(name, 0, 1, kHere); }).code == Code::kNotFound);
}

TEST_CASE("private regions end with their connection, others stay") {
  const Object object;
  SharedRegions regions(5, 16 * kPage);
  regions.add("named", object.key, 0, 1, kHere);
  const std::string first = regions.add_private(object.key, kPage, kHere, 1);
  const std::string second = regions.add_private(object.key, kPage, kHere, 2);
  const RegionView used = regions.view(first, 0, 1, kHere);
  regions.connection_closed(1);
  CHECK(refusal([&] { regions.view(first, 0, 1, kHere); }).code == Code::kNotFound);
  CHECK(byte_at(used, 0) == 0);
  regions.view(second, 0, 1, kHere);
  regions.view("named", 0, 1, kHere);
}

TEST_CASE("no region outlives a connection that closed before it was made") {
  const Object object;
  SharedRegions regions(3, 8 * kPage);
  regions.connection_closed(7);
  CHECK(refusal([&] { regions.add_private(object.key, 1, kHere, 7); }).code == Code::kCancelled);
  CHECK(regions.mapped_bytes() == 0);
  for (std::uint64_t connection = 8; connection < 6000; ++connection) {
    regions.connection_closed(connection);
  }
  regions.add_private(object.key, 1, kHere, 6000);
}

TEST_CASE("a region in use is unmapped when its last view is gone") {
  const Object object;
  SharedRegions regions(3, 8 * kPage);
  regions.add("a", object.key, 0, kPage, kHere);
  {
    const RegionView view = regions.view("a", 7, 1, kHere);
    regions.remove("a", kHere);
    fs::remove(object.path);
    CHECK(byte_at(view, 0) == 7);
    CHECK(regions.mapped_bytes() == kPage);
  }
  CHECK(regions.mapped_bytes() == 0);
}

TEST_CASE("a view may outlast the registry") {
  const Object object;
  auto regions = std::make_unique<SharedRegions>(3, 8 * kPage);
  regions->add("a", object.key, 0, kPage, kHere);
  const RegionView view = regions->view("a", 3, 1, kHere);
  regions.reset();
  CHECK(byte_at(view, 0) == 3);
}

TEST_CASE("regions and bytes are limited") {
  const Object object;
  SharedRegions regions(3, 8 * kPage);
  for (const char* name : {"0", "1", "2"}) regions.add(name, object.key, 0, 10, kHere);
  const Status many = refusal([&] { regions.add("3", object.key, 0, 10, kHere); });
  CHECK(many.code == Code::kResourceExhausted);
  CHECK(many.message ==
        "shared-memory regions: 3 are registered; allowed: 3 (--max-shared-regions)");
  CHECK(many.retry_after > std::chrono::seconds(0));
  regions.remove_all(kHere);
  CHECK(regions.mapped_bytes() == 0);
  SharedRegions small(9, 3 * kPage);
  small.add("a", object.key, 0, 2 * kPage, kHere);
  const Status full = refusal([&] { small.add("b", object.key, 0, 2 * kPage, kHere); });
  CHECK(full.code == Code::kResourceExhausted);
  CHECK(full.message ==
        "shared memory: 8192 bytes are mapped and 8192 more were asked for; "
        "allowed: 12288 (--max-shared-mib)");
  CHECK(full.retry_after > std::chrono::seconds(0));
  CHECK(small.mapped_bytes() == 2 * kPage);
  SharedRegions off(0, 3 * kPage), tiny(1, kPage);
  CHECK(refusal([&] { off.add("a", object.key, 0, 1, kHere); }).retry_after ==
        std::chrono::seconds(0));
  CHECK(refusal([&] { tiny.add("a", object.key, 0, 2 * kPage, kHere); }).retry_after ==
        std::chrono::seconds(0));
}

TEST_CASE("an object cut short after it was registered gives no view") {
  const Object object;
  SharedRegions regions(3, 8 * kPage);
  regions.add("a", object.key, 0, 2 * kPage, kHere);
  object.truncate(kPage);
  const Status status = refusal([&] { regions.view("a", kPage, 1, kHere); });
  CHECK(status.code == Code::kInvalidArgument);
  CHECK(status.message == text("shared_memory region 'a': given bytes up to 4097 of '", object.key,
                               "'; allowed: its first 4096: the object was truncated after it was "
                               "registered"));
  CHECK(byte_at(regions.view("a", 0, kPage, kHere), 3) == 3);
}

TEST_CASE("an object cut short while a request uses it costs that request alone") {
  const Object object, other;
  SharedRegions regions(3, 8 * kPage);
  regions.add("a", object.key, 0, 2 * kPage, kHere);
  regions.add("b", other.key, 0, 2 * kPage, kHere);
  const RegionView view = regions.view("a", kPage, kPage, kHere);
  const RegionView intact = regions.view("b", 0, kPage, kHere);
  object.truncate(0);
  for (std::size_t at = 0; at < kPage; at += 64) CHECK(byte_at(view, at) == 0);
  view.bytes[0] = std::byte{1};  // an answer written there goes nowhere
  const Status status = refusal([&] { view.check_intact(); });
  CHECK(status.code == Code::kInvalidArgument);
  CHECK(contains(status.message, "the object was truncated after it was registered"));
  object.truncate(2 * kPage);  // too late: what was read is worth nothing
  CHECK(refusal([&] { view.check_intact(); }).code == Code::kInvalidArgument);
  CHECK(refusal([&] { regions.view("a", 0, 1, kHere); }).code == Code::kInvalidArgument);
  CHECK(byte_at(intact, 9) == 9);
  intact.check_intact();
  regions.remove("a", kHere);
  regions.add("a", object.key, 0, 2 * kPage, kHere);
  regions.view("a", 0, 2 * kPage, kHere).check_intact();
}

TEST_CASE("holes get their pages when a region is registered") {
  const Object object(0);
  object.truncate(64 * kPage);
  struct stat found{};
  REQUIRE(stat(object.path.c_str(), &found) == 0);
  REQUIRE(found.st_blocks == 0);
  SharedRegions regions(3, 64 * kPage);
  regions.add("a", object.key, 16 * kPage, 32 * kPage, kHere);
  REQUIRE(stat(object.path.c_str(), &found) == 0);
  CHECK(found.st_blocks == 32 * kPage / 512);
  CHECK(found.st_size == 64 * kPage);
}

TEST_CASE("an object that /dev/shm has no room for is refused, not run into") {
  const Object object(0);
  const auto size = static_cast<std::uint64_t>(fs::space("/dev/shm").capacity) * 4;
  if (size > std::uint64_t{1} << 45) return;
  object.truncate(size);
  SharedRegions regions(3, 2 * size);
  const Status status = refusal([&] { regions.add("a", object.key, 0, size, kHere); });
  CHECK(status.code == Code::kResourceExhausted);
  CHECK(status.message == text("shared memory: ", size, " bytes of '", object.key,
                               "' were asked for; /dev/shm has no room for them"));
  CHECK(regions.mapped_bytes() == 0);
  CHECK(regions.status("", kHere).empty());
  struct stat found{};
  REQUIRE(stat(object.path.c_str(), &found) == 0);
  CHECK(found.st_blocks == 0);
}

TEST_CASE("regions come and go on several threads while one of them is cut short") {
  SharedRegions regions(64, 1 << 30);
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (int number = 0; number < 4; ++number) {
    threads.emplace_back([&, number] {
      const Object object(4 * kPage);
      for (int count = 0; count < 250; ++count) {
        const std::string name = text(number, '-', count);
        object.truncate(4 * kPage);
        regions.add(name, object.key, 0, 4 * kPage, kHere);
        const RegionView view = regions.view(name, 0, 4 * kPage, kHere);
        const bool cut = count % 3 == 0;
        if (cut) object.truncate(kPage);
        int sum = 0;
        for (std::size_t at = 0; at < 4 * kPage; at += 512) sum += byte_at(view, at);
        const bool refused = !refusal([&] { view.check_intact(); }).ok();
        if (refused != cut || sum != 0) ++failures;
        regions.remove(name, kHere);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(failures == 0);
  CHECK(regions.mapped_bytes() == 0);
}

TEST_CASE("several threads that touch missing pages at once all go on") {
  const Object object(64 * kPage);
  SharedRegions regions(3, 64 * kPage);
  regions.add("a", object.key, 0, 64 * kPage, kHere);
  const RegionView view = regions.view("a", 0, 64 * kPage, kHere);
  object.truncate(0);
  std::atomic<int> sum{0};
  std::vector<std::thread> threads;
  for (int number = 0; number < 4; ++number) {
    threads.emplace_back([&] {
      for (std::size_t at = 1; at < 64 * kPage; at += kPage) sum += byte_at(view, at);
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(sum == 0);
  CHECK_FALSE(refusal([&] { view.check_intact(); }).ok());
}

TEST_CASE("a fault elsewhere ends the process as ever") {
  const Object object, outside;
  SharedRegions regions(3, 8 * kPage);
  regions.add("a", object.key, 0, kPage, kHere);
  const int touched = end_of_child([&] {
    const int file = open(outside.path.c_str(), O_RDWR);
    auto* memory = static_cast<volatile char*>(
        mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
    outside.truncate(0);
    (void)memory[0];
  });
  CHECK(touched != 0);
  const int sent = end_of_child([] { raise(SIGBUS); });
  CHECK(sent != 0);
}

TEST_CASE("local peers are owners") {
  const std::vector<std::pair<std::string, std::string>> peers{
      {"ipv4:127.0.0.1:50000", "127.0.0.1"},
      {"ipv4:127.8.9.1:50000", "127.8.9.1"},
      {"ipv6:%5B::1%5D:50000", "::1"},
      {"ipv6:[::1]:50000", "::1"},
      {"ipv6:%5b::ffff:127.0.0.1%5d:50000", "127.0.0.1"},
      {"ipv6:[0:0:0:0:0:0:0:1]:5", "::1"},
      {"unix:", "unix"},
      {"unix:/run/a.sock", "unix"},
      {"unix-abstract:a", "unix"},
  };
  for (const auto& [peer, owner] : peers) CHECK(owner_of(peer) == owner);
}

TEST_CASE("other peers are refused") {
  for (const std::string peer :
       {"ipv4:10.0.0.1:50000", "ipv6:%5Bfe80::1%5D:1", "ipv6:%5B::ffff:10.0.0.1%5D:1", "", "x",
        "::1", "unix", "ipv4:", "ipv4:127.0.0.1", "ipv6:%", "ipv6:%5", "ipv6:%zz", "ipv6:[]:1"}) {
    const Status status = refusal([&] { owner_of(peer); });
    CHECK(status.code == Code::kPermissionDenied);
    CHECK(status.message ==
          text("shared memory: given by a caller at ", peer,
               "; allowed: callers on this host, over loopback or a Unix socket"));
  }
}
