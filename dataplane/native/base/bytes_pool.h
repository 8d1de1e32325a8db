// The pool behind Bytes: freed memory is kept for the next request of about the same size, because
// memory that is new from the system costs a page fault every 4 KiB, more than reading it does.
#pragma once

#include <cstddef>

namespace attnserve {

struct PoolBlock {
  std::byte* memory = nullptr;
  std::size_t capacity = 0;
};

// At least `size` bytes (size > 0), aligned to kAlignment; `memory` is nullptr if none is left.
// Any thread, as everything here.
PoolBlock pool_take(std::size_t size);
void pool_give_back(PoolBlock block) noexcept;  // as pool_take gave it

}  // namespace attnserve
