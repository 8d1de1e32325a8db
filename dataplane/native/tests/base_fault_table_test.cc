#include <doctest/doctest.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/fault_table.h"

using namespace attnserve;

TEST_CASE("while a scope is open a page that a file has lost is zeros, and the scope is broken") {
  constexpr std::size_t kSize = 1 << 16;
  const int file = memfd_create("test", MFD_CLOEXEC);
  REQUIRE(ftruncate(file, kSize) == 0);
  REQUIRE(pwrite(file, "x", 1, 0) == 1);
  auto* bytes = static_cast<volatile char*>(
      mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0));
  {
    const FaultScope whole;
    CHECK(bytes[0] == 'x');
    CHECK_FALSE(whole.broken());
    REQUIRE(ftruncate(file, 0) == 0);
    CHECK(bytes[0] == 0);
    CHECK(bytes[kSize - 1] == 0);
    CHECK(whole.broken());
    const FaultScope later;
    CHECK_FALSE(later.broken());
  }
  munmap(const_cast<char*>(bytes), kSize);
  close(file);
}
