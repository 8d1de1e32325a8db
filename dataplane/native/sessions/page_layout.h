// Where keys and values of a KV cache lie in memory: what the store, which owns the memory, and the
// operator PagedAttention of attnserve-kernels, which reads and writes it, agree on.
//
// A page holds `page_tokens` tokens of one layer:
//
//   keys          [num_kv_heads][page_tokens][head_dim]        in the cache's type
//   values        [num_kv_heads][page_tokens][value_head_dim]  in the cache's type
//   key scales    [num_kv_heads][page_tokens] float            only of kInt8 and kFp8
//   value scales  [num_kv_heads][page_tokens] float            only of kInt8 and kFp8
//
// one after another without gaps, rounded up to a multiple of 64 bytes. A latent one holds keys and
// their scales alone: the values are the keys' first value_head_dim numbers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace attnserve::sessions {

// The operator's numbers for `cache_dtype`.
enum class CacheType : std::uint8_t {
  kFp32 = 0,
  kFp16 = 1,
  kBf16 = 2,
  kInt8 = 3,  // and a scale for each token and head
  kFp8 = 4,   // e4m3, likewise
};

constexpr std::size_t item_bytes(CacheType type) {
  if (type == CacheType::kFp32) return 4;
  return type == CacheType::kFp16 || type == CacheType::kBf16 ? 2 : 1;
}

constexpr bool has_scales(CacheType type) {
  return type == CacheType::kInt8 || type == CacheType::kFp8;
}

// A value. All sizes are at least 1; `page_tokens` is a multiple of 4, so that scales are aligned.
struct PageLayout {
  static constexpr std::size_t kAlignment = 64;

  std::size_t num_kv_heads = 1;
  std::size_t head_dim = 1;
  std::size_t value_head_dim = 1;
  CacheType type = CacheType::kFp32;
  std::size_t page_tokens = 16;
  bool latent = false;

  bool operator==(const PageLayout&) const = default;

  constexpr std::size_t rows() const { return num_kv_heads * page_tokens; }
  constexpr std::size_t row_of(std::size_t head, std::size_t token) const {
    return head * page_tokens + token;
  }

  // Bytes of one token and head.
  constexpr std::size_t key_row_bytes() const { return head_dim * item_bytes(type); }
  constexpr std::size_t value_row_bytes() const {
    return latent ? 0 : value_head_dim * item_bytes(type);
  }
  constexpr std::size_t key_scale_bytes() const { return has_scales(type) ? sizeof(float) : 0; }
  constexpr std::size_t value_scale_bytes() const { return latent ? 0 : key_scale_bytes(); }

  // Bytes from the page's start; `row` as row_of gives it. Scales only where has_scales.
  constexpr std::size_t key_at(std::size_t row) const { return row * key_row_bytes(); }
  constexpr std::size_t value_at(std::size_t row) const {
    return key_at(rows()) + row * value_row_bytes();
  }
  constexpr std::size_t key_scale_at(std::size_t row) const {
    return value_at(rows()) + row * key_scale_bytes();
  }
  constexpr std::size_t value_scale_at(std::size_t row) const {
    return key_scale_at(rows()) + row * value_scale_bytes();
  }

  constexpr std::size_t page_bytes() const {
    return (value_scale_at(rows()) + kAlignment - 1) / kAlignment * kAlignment;
  }
  // Pages for so many tokens.
  constexpr std::size_t pages(std::size_t tokens) const {
    return (tokens + page_tokens - 1) / page_tokens;
  }
};

}  // namespace attnserve::sessions
