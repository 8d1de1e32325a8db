// Names and handles that nobody can guess, from the kernel's generator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace attnserve {

void fill_random(std::span<std::uint8_t> bytes);

std::string random_hex(std::size_t bytes);       // two lower-case digits a byte
std::string random_url_safe(std::size_t bytes);  // base64 of RFC 4648 section 5, not padded

}  // namespace attnserve
