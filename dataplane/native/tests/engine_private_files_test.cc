#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <string_view>

#include "engine/private_files.h"

using namespace attnserve::engine;

namespace {

constexpr std::size_t kPages = 8;
const auto kPage = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));

// A file of pages of 'a', 'b', ..., in a folder of its own.
class PagesFile {
 public:
  PagesFile() {
    std::string folder = (std::filesystem::temp_directory_path() / "attnserve_XXXXXX").string();
    folder_ = mkdtemp(folder.data());
    number_ = open((folder_ / "some data").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    for (std::size_t page = 0; page < kPages; ++page) fill(page, static_cast<char>('a' + page));
  }
  PagesFile(const PagesFile&) = delete;
  PagesFile& operator=(const PagesFile&) = delete;
  ~PagesFile() {
    close(number_);
    std::filesystem::remove_all(folder_);
  }

  void fill(std::size_t page, char with) const {
    const std::string bytes(kPage, with);
    REQUIRE(pwrite(number_, bytes.data(), kPage, static_cast<off_t>(page * kPage)) ==
            static_cast<ssize_t>(kPage));
  }
  void cut(std::size_t pages) const {
    REQUIRE(ftruncate(number_, static_cast<off_t>(pages * kPage)) == 0);
  }
  const std::filesystem::path& folder() const { return folder_; }
  int number() const { return number_; }

 private:
  std::filesystem::path folder_;
  int number_ = -1;
};

class Mapped {
 public:
  Mapped(const PagesFile& file, std::size_t first, std::size_t pages)
      : pages_(pages),
        bytes_(static_cast<char*>(mmap(nullptr, pages * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE,
                                       file.number(), static_cast<off_t>(first * kPage)))) {}
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;
  ~Mapped() { munmap(bytes_, pages_ * kPage); }
  // The first character of each page, and that it is also the last.
  std::string read() const {
    std::string all;
    for (std::size_t page = 0; page < pages_; ++page) {
      all += bytes_[page * kPage];
      CHECK(bytes_[(page + 1) * kPage - 1] == all.back());
    }
    return all;
  }

 private:
  std::size_t pages_;
  char* bytes_;
};

}  // namespace

TEST_CASE("what was mapped of a folder's files stays as it was, whatever becomes of them") {
  const PagesFile file, other;
  PrivateFiles files;
  const Mapped first(file, 1, 3), elsewhere(other, 0, 2);
  files.take_over(file.folder());
  const Mapped second(file, 2, 6);  // of another session, with pages that are copied already
  files.take_over(file.folder());
  file.fill(1, 'X');
  file.fill(7, 'X');
  file.cut(2);
  CHECK(first.read() == "bcd");
  CHECK(second.read() == "cdefgh");
  other.fill(0, 'X');
  CHECK(elsewhere.read() == "Xb");  // none of that folder's
}

TEST_CASE("a file that was cut short before it could be copied is an error that names it") {
  const PagesFile file;
  PrivateFiles files;
  const Mapped mapped(file, 0, 4);
  file.cut(2);
  std::string why;
  try {
    files.take_over(file.folder());
  } catch (const std::runtime_error& error) {
    why = error.what();
  }
  CHECK(why.find("some data: could not be copied: ") != std::string::npos);
}
