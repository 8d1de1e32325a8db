#include "requests/elements.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <span>
#include <string>

#include "base/half.h"
#include "base/text.h"
#include "requests/refusal.h"

namespace attnserve::requests {
namespace {

// A block's elements are looked at without a branch between them, so that the compiler can look at
// many at once.
constexpr std::size_t kBlock = 256;

// How an element type of this many bits says NaN and infinity; elements as unsigned integers.
struct Fp32 {
  using Bits = std::uint32_t;
  static constexpr Bits kInfinity = 0x7F800000U, kSign = 0x80000000U;
};
struct Fp16 {
  using Bits = std::uint16_t;
  static constexpr Bits kInfinity = 0x7C00U, kSign = 0x8000U;
};
struct Bf16 {
  using Bits = std::uint16_t;
  static constexpr Bits kInfinity = 0x7F80U, kSign = 0x8000U;
};

template <class Type>
bool is_nan(typename Type::Bits element) {
  return (element & (Type::kSign - 1)) > Type::kInfinity;
}

template <class Type>
bool is_wrong(typename Type::Bits element) {
  return is_nan<Type>(element) | (element == Type::kInfinity);
}

struct Wrong {
  std::size_t at;
  bool nan;
};

// The first NaN or, if there is none, the first +infinity.
template <class Type>
std::optional<Wrong> find_wrong(const std::byte* data, std::size_t count) {
  const auto* elements = reinterpret_cast<const typename Type::Bits*>(data);
  std::optional<Wrong> infinite;
  for (std::size_t start = 0; start < count; start += kBlock) {
    const std::size_t size = std::min(kBlock, count - start);
    bool any = false;
    if (size == kBlock) {
      for (std::size_t i = 0; i < kBlock; ++i) any |= is_wrong<Type>(elements[start + i]);
    } else {
      for (std::size_t i = 0; i < size; ++i) any |= is_wrong<Type>(elements[start + i]);
    }
    if (!any) continue;
    for (std::size_t i = start; i < start + size; ++i) {
      if (is_nan<Type>(elements[i])) return Wrong{i, true};
      if (!infinite && is_wrong<Type>(elements[i])) infinite = Wrong{i, false};
    }
  }
  return infinite;
}

std::optional<Wrong> find_wrong(const Tensor& tensor) {
  const auto count = static_cast<std::size_t>(tensor.shape.elements());
  switch (tensor.dtype) {
    case DataType::kFp16:
      return find_wrong<Fp16>(tensor.data, count);
    case DataType::kBf16:
      return find_wrong<Bf16>(tensor.data, count);
    default:
      return find_wrong<Fp32>(tensor.data, count);
  }
}

template <class Element, class Scale>
void scale_each(ByteSpan from, MutableByteSpan to, Scale scale) {
  auto* scaled = reinterpret_cast<Element*>(to.data());
  const std::size_t count = from.size() / sizeof(Element);
  for (std::size_t i = 0; i < count; ++i) {
    Element element;
    std::memcpy(&element, from.data() + i * sizeof(Element), sizeof(Element));
    scaled[i] = scale(element);
  }
}

}  // namespace

void check_key_lengths(const Tensor& key_lengths, std::int64_t key_len) {
  const auto* lengths = reinterpret_cast<const std::int64_t*>(key_lengths.data);
  for (std::int64_t row = 0; row < key_lengths.shape[0]; ++row) {
    const std::int64_t length = lengths[row];
    if (length < 0 || length > key_len) {
      refuse(text("key_lengths[", row, "]"), std::to_string(length), text("0..", key_len));
    }
  }
}

void check_bias(const Tensor& bias) {
  const std::optional<Wrong> wrong = find_wrong(bias);
  if (!wrong) return;
  Shape place = bias.shape;
  auto rest = static_cast<std::int64_t>(wrong->at);
  for (std::size_t axis = place.rank(); axis-- > 0;) {
    const std::int64_t size = place[axis];
    place[axis] = rest % size;
    rest /= size;
  }
  refuse(text("bias", list_text(place.sizes())), wrong->nan ? "nan" : "inf",
         "finite numbers and -infinity");
}

void scale_elements(DataType dtype, ByteSpan from, float factor, MutableByteSpan to) {
  switch (dtype) {
    case DataType::kFp16:
      return scale_each<std::uint16_t>(from, to, [factor](std::uint16_t element) {
        return half_of_float(float_of_half(element) * factor);
      });
    case DataType::kBf16:
      return scale_each<std::uint16_t>(from, to, [factor](std::uint16_t element) {
        return bfloat16_of_float(float_of_bfloat16(element) * factor);
      });
    default:
      return scale_each<float>(from, to, [factor](float element) { return element * factor; });
  }
}

}  // namespace attnserve::requests
