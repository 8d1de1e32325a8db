// Copying where source and destination lie as callers' bytes happen to.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>

namespace attnserve {

// As std::memcpy, in pieces too small for the `rep movsb` that C libraries use for large ones: on
// AMD's Zen processors that is 15 times slower where the destination lies a few bytes behind the
// source, counted within a page (196 KB: 56 us instead of 3.5).
inline void copy_bytes(std::byte* to, const std::byte* from, std::size_t size) {
  constexpr std::size_t kPiece = 4096;
  for (; size > kPiece; size -= kPiece, to += kPiece, from += kPiece) std::memcpy(to, from, kPiece);
  if (size > 0) std::memcpy(to, from, size);
}

}  // namespace attnserve
