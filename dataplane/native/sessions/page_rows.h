// Copies of tokens between pages, bit for bit, scales included.
#pragma once

#include <cstddef>
#include <cstring>

#include "sessions/page_layout.h"

namespace attnserve::sessions {

// `count` tokens of a page, from `first` on, to where `target` lies in another page, or in the same
// one if they do not overlap.
inline void copy_tokens(const PageLayout& layout, const std::byte* from, std::size_t first,
                        std::byte* to, std::size_t target, std::size_t count) {
  for (std::size_t head = 0; head < layout.num_kv_heads; ++head) {
    const std::size_t source_row = layout.row_of(head, first);
    const std::size_t target_row = layout.row_of(head, target);
    std::memcpy(to + layout.key_at(target_row), from + layout.key_at(source_row),
                count * layout.key_row_bytes());
    std::memcpy(to + layout.value_at(target_row), from + layout.value_at(source_row),
                count * layout.value_row_bytes());
    if (!has_scales(layout.type)) continue;
    std::memcpy(to + layout.key_scale_at(target_row), from + layout.key_scale_at(source_row),
                count * layout.key_scale_bytes());
    std::memcpy(to + layout.value_scale_at(target_row), from + layout.value_scale_at(source_row),
                count * layout.value_scale_bytes());
  }
}

}  // namespace attnserve::sessions
