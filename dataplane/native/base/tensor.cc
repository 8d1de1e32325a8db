#include "base/tensor.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace attnserve {

namespace {

struct TypeRow {
  std::string_view name;
  std::size_t bytes;
};

// By number of DataType.
constexpr std::array<TypeRow, 8> kTypes{{
    {"DATA_TYPE_UNSPECIFIED", 0},
    {"FP32", 4},
    {"FP16", 2},
    {"BF16", 2},
    {"INT64", 8},
    {"INT32", 4},
    {"BOOL", 1},
    {"UINT8", 1},
}};

const TypeRow& row_of(DataType dtype) {
  const auto number = static_cast<std::size_t>(dtype);
  return kTypes[number < kTypes.size() ? number : 0];
}

}  // namespace

std::size_t item_bytes(DataType dtype) { return row_of(dtype).bytes; }

std::string_view name_of(DataType dtype) { return row_of(dtype).name; }

DataType data_type_of(std::string_view name) {
  const auto* found = std::ranges::find(kTypes, name, &TypeRow::name);
  return found == kTypes.end() ? DataType::kUnspecified
                               : static_cast<DataType>(found - kTypes.begin());
}

Shape::Shape(std::initializer_list<std::int64_t> sizes)
    : Shape(std::span<const std::int64_t>(sizes.begin(), sizes.size())) {}

Shape::Shape(std::span<const std::int64_t> sizes) : rank_(sizes.size()) {
  if (rank_ > kMostDimensions) throw std::length_error("a shape of more than 8 axes");
  std::ranges::copy(sizes, sizes_.begin());
}

std::int64_t Shape::elements() const {
  if (std::ranges::find(sizes(), 0) != sizes().end()) return 0;
  std::int64_t product = 1;
  for (const std::int64_t size : sizes()) {
    if (__builtin_mul_overflow(product, size, &product)) {
      return std::numeric_limits<std::int64_t>::max();
    }
  }
  return product;
}

bool Shape::operator==(const Shape& other) const {
  return std::ranges::equal(sizes(), other.sizes());
}

std::size_t Tensor::byte_size() const {
  std::size_t bytes = 0;
  return __builtin_mul_overflow(static_cast<std::size_t>(shape.elements()), item_bytes(dtype),
                                &bytes)
             ? std::numeric_limits<std::size_t>::max()
             : bytes;
}

}  // namespace attnserve
