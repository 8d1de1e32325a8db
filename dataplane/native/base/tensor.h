// Element types, shapes and tensors as every layer means them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string_view>

#include "base/memory.h"

namespace attnserve {

// The numbers of attnserve.v1.DataType.
enum class DataType : std::uint8_t {
  kUnspecified = 0,
  kFp32 = 1,
  kFp16 = 2,
  kBf16 = 3,
  kInt64 = 4,
  kInt32 = 5,
  kBool = 6,
  kUint8 = 7,  // bytes of the server's own; in no message
};

std::size_t item_bytes(DataType dtype);        // 0 for kUnspecified
std::string_view name_of(DataType dtype);      // "FP32"; "DATA_TYPE_UNSPECIFIED"
DataType data_type_of(std::string_view name);  // kUnspecified if there is none of that name

constexpr std::size_t kMostDimensions = 8;

// Sizes along each axis, row-major; a value.
class Shape {
 public:
  Shape() = default;
  Shape(std::initializer_list<std::int64_t> sizes);
  // Throws std::length_error beyond kMostDimensions.
  explicit Shape(std::span<const std::int64_t> sizes);

  std::size_t rank() const { return rank_; }
  std::int64_t operator[](std::size_t axis) const { return sizes_[axis]; }
  std::int64_t& operator[](std::size_t axis) { return sizes_[axis]; }
  std::span<const std::int64_t> sizes() const { return {sizes_.data(), rank_}; }
  // The product of sizes that are all at least 0; 1 for rank 0; the largest int64 if it is more.
  std::int64_t elements() const;
  bool operator==(const Shape& other) const;

 private:
  std::array<std::int64_t, kMostDimensions> sizes_{};
  std::size_t rank_ = 0;
};

// Elements somewhere in memory, row-major and contiguous. A view: it owns nothing; whoever holds it
// sees to it that `data` lives.
struct Tensor {
  DataType dtype = DataType::kUnspecified;
  Shape shape;
  std::byte* data = nullptr;

  std::size_t byte_size() const;  // the largest size_t if it is more
  // At a multiple of its element size, as kernels rely on; without a dtype it is anywhere.
  bool aligned() const {
    const std::size_t item = item_bytes(dtype);
    return item == 0 || reinterpret_cast<std::uintptr_t>(data) % item == 0;
  }
};

}  // namespace attnserve
