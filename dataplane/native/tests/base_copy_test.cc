#include <doctest/doctest.h>

#include <vector>

#include "base/copy.h"

using attnserve::copy_bytes;

TEST_CASE("every byte is copied, and no other is touched") {
  for (const std::size_t size : {0UL, 1UL, 4095UL, 4096UL, 4097UL, 8192UL, 100003UL}) {
    std::vector<std::byte> from(size + 1);
    for (std::size_t i = 0; i < size; ++i) from[i] = static_cast<std::byte>(i * 31 + 1);
    std::vector<std::byte> to(size + 2, std::byte{0xEE});
    copy_bytes(to.data() + 1, from.data(), size);
    CHECK(to.front() == std::byte{0xEE});
    CHECK(to.back() == std::byte{0xEE});
    bool same = true;
    for (std::size_t i = 0; i < size; ++i) same = same && to[i + 1] == from[i];
    CHECK(same);
  }
}
