#include "base/random.h"

#include <sys/random.h>

#include <cerrno>
#include <cstdint>
#include <system_error>
#include <vector>

namespace attnserve {

namespace {

std::vector<std::uint8_t> random_bytes(std::size_t count) {
  std::vector<std::uint8_t> bytes(count);
  fill_random(bytes);
  return bytes;
}

}  // namespace

void fill_random(std::span<std::uint8_t> bytes) {
  std::size_t filled = 0;
  while (filled < bytes.size()) {
    const ssize_t got = getrandom(bytes.data() + filled, bytes.size() - filled, 0);
    if (got < 0) {
      if (errno == EINTR) continue;
      throw std::system_error(errno, std::generic_category(), "getrandom");
    }
    filled += static_cast<std::size_t>(got);
  }
}

std::string random_hex(std::size_t bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string digits;
  digits.reserve(2 * bytes);
  for (const std::uint8_t byte : random_bytes(bytes)) {
    digits += kDigits[byte >> 4];
    digits += kDigits[byte & 15];
  }
  return digits;
}

std::string random_url_safe(std::size_t bytes) {
  constexpr char kLetters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
  std::string letters;
  letters.reserve((bytes * 8 + 5) / 6);
  std::uint32_t waiting = 0;
  unsigned bits = 0;
  for (const std::uint8_t byte : random_bytes(bytes)) {
    waiting = waiting << 8 | byte;
    for (bits += 8; bits >= 6;) {
      bits -= 6;
      letters += kLetters[waiting >> bits & 63];
    }
  }
  if (bits > 0) letters += kLetters[waiting << (6 - bits) & 63];
  return letters;
}

}  // namespace attnserve
