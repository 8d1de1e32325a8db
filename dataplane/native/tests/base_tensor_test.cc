#include <doctest/doctest.h>

#include <limits>
#include <stdexcept>
#include <vector>

#include "base/tensor.h"

using namespace attnserve;

TEST_CASE("element types have sizes and names") {
  for (int number = 1; number <= 6; ++number) {
    const auto dtype = static_cast<DataType>(number);
    CHECK(item_bytes(dtype) > 0);
    CHECK(data_type_of(name_of(dtype)) == dtype);
  }
  CHECK(name_of(DataType::kBf16) == "BF16");
  CHECK(item_bytes(DataType::kInt64) == 8);
  CHECK(item_bytes(DataType::kUnspecified) == 0);
  CHECK(item_bytes(static_cast<DataType>(99)) == 0);
  CHECK(data_type_of("fp32") == DataType::kUnspecified);
  CHECK(data_type_of("") == DataType::kUnspecified);
}

TEST_CASE("a shape is a value") {
  Shape shape{2, 3, 4};
  CHECK(shape.rank() == 3);
  CHECK(shape.elements() == 24);
  CHECK(shape == Shape{2, 3, 4});
  CHECK_FALSE(shape == Shape{2, 3, 4, 1});
  shape[1] = 5;
  CHECK(shape.elements() == 40);
  CHECK(Shape{}.elements() == 1);
  CHECK(Shape{0, 7}.elements() == 0);
  CHECK_THROWS_AS(Shape(std::vector<std::int64_t>(9, 1)), std::length_error);
}

TEST_CASE("sizes whose product does not fit are huge, not small") {
  constexpr std::int64_t kLarge = std::int64_t{1} << 62;
  CHECK(Shape{kLarge, kLarge}.elements() == std::numeric_limits<std::int64_t>::max());
  CHECK(Shape{kLarge, kLarge, 0}.elements() == 0);
  const Tensor tensor{DataType::kFp32, Shape{kLarge}, nullptr};
  CHECK(tensor.byte_size() == std::numeric_limits<std::size_t>::max());
  CHECK(Tensor{DataType::kFp16, Shape{3, 5}, nullptr}.byte_size() == 30);
}

TEST_CASE("a tensor is aligned to its elements, one without a dtype to anything") {
  alignas(8) std::byte memory[16];
  CHECK(Tensor{DataType::kInt64, {1}, memory}.aligned());
  CHECK_FALSE(Tensor{DataType::kInt64, {1}, memory + 4}.aligned());
  CHECK(Tensor{DataType::kFp32, {1}, memory + 4}.aligned());
  CHECK(Tensor{DataType::kUnspecified, {1}, memory + 1}.aligned());
  CHECK(Tensor{}.aligned());
}
