#include "requests/elements.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>

#include "base/half.h"
#include "base/text.h"
#include "requests/refusal.h"

namespace attnserve::requests {
namespace {

// Calls `each(start, size)` for all elements. Most sizes are one constant, which makes compilers do
// many elements at once.
template <class Each>
void for_each_block(std::size_t count, Each each) {
  constexpr std::integral_constant<std::size_t, 256> kBlock;
  std::size_t start = 0;
  for (; count - start >= kBlock; start += kBlock) each(start, kBlock);
  if (start < count) each(start, count - start);
}

// How an element type says infinity; its elements as signed integers of its size.
struct Fp32 {
  using Bits = std::int32_t;
  static constexpr Bits kInfinity = 0x7F800000;
};
struct Fp16 {
  using Bits = std::int16_t;
  static constexpr Bits kInfinity = 0x7C00;
};
struct Bf16 {
  using Bits = std::int16_t;
  static constexpr Bits kInfinity = 0x7F80;
};

template <class Bits>
constexpr Bits kSign = std::numeric_limits<Bits>::min();

template <class Type>
bool is_nan(typename Type::Bits element) {
  return (element & ~kSign<typename Type::Bits>) > Type::kInfinity;
}

// +infinity or NaN of either sign: all that lies above, with the sign as it is or turned, for
// floats of one sign are ordered as the integers.
template <class Type>
bool is_wrong(typename Type::Bits element) {
  using Bits = typename Type::Bits;
  const auto turned = static_cast<Bits>(element ^ kSign<Bits>);
  return (element >= Type::kInfinity) | (turned > Type::kInfinity);
}

struct Wrong {
  std::size_t at;
  bool nan;
};

// The first NaN or, if there is none, the first +infinity.
template <class Type>
std::optional<Wrong> find_wrong(const std::byte* data, std::size_t count) {
  using Bits = typename Type::Bits;
  const auto* elements = reinterpret_cast<const Bits*>(data);
  std::optional<Wrong> nan, infinite;
  for_each_block(count, [&](std::size_t start, auto size) {
    Bits any = 0;
    for (std::size_t i = 0; i < size; ++i) {
      any = static_cast<Bits>(any | is_wrong<Type>(elements[start + i]));
    }
    if (any == 0 || nan) return;
    for (std::size_t i = start; i < start + size; ++i) {
      if (!nan && is_nan<Type>(elements[i])) nan = Wrong{i, true};
      if (!infinite && is_wrong<Type>(elements[i])) infinite = Wrong{i, false};
    }
  });
  return nan ? nan : infinite;
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
  for_each_block(from.size() / sizeof(Element), [&](std::size_t start, auto size) {
    const std::byte* bytes = from.data() + start * sizeof(Element);
    for (std::size_t i = 0; i < size; ++i) {
      Element element;
      std::memcpy(&element, bytes + i * sizeof(Element), sizeof(Element));
      scaled[start + i] = scale(element);
    }
  });
}

// "name[0, 3]": an element of a tensor by its number.
std::string place_text(std::string_view field, const Tensor& tensor, std::size_t at) {
  Shape place = tensor.shape;
  auto rest = static_cast<std::int64_t>(at);
  for (std::size_t axis = place.rank(); axis-- > 0;) {
    const std::int64_t size = place[axis];
    place[axis] = rest % size;
    rest /= size;
  }
  return text(field, list_text(place.sizes()));
}

// Zeros where the mask's bytes are 1, `hidden` where they are 0.
template <class Bits>
void hide(const std::byte* mask, std::size_t count, Bits hidden, std::byte* to) {
  auto* bias = reinterpret_cast<Bits*>(to);
  for_each_block(count, [&](std::size_t start, auto size) {
    for (std::size_t i = 0; i < size; ++i) {
      bias[start + i] = mask[start + i] == std::byte{0} ? hidden : Bits{0};
    }
  });
}

}  // namespace

void check_lengths(std::string_view field, const Tensor& lengths, std::int64_t key_len) {
  const auto* given = reinterpret_cast<const std::int64_t*>(lengths.data);
  for (std::int64_t row = 0; row < lengths.shape[0]; ++row) {
    if (given[row] < 0 || given[row] > key_len) {
      refuse(text(field, "[", row, "]"), std::to_string(given[row]), text("0..", key_len));
    }
  }
}

void check_starts(std::string_view field, const Tensor& starts, std::int64_t end) {
  const auto* given = reinterpret_cast<const std::int64_t*>(starts.data);
  const std::int64_t last = starts.shape[0] - 1;
  for (std::int64_t at = 0; at <= last; ++at) {
    const std::int64_t least = at == 0 ? 0 : at == last ? end : given[at - 1];
    const std::int64_t most = at == 0 ? 0 : end;
    if (given[at] >= least && given[at] <= most) continue;
    refuse(text(field, "[", at, "]"), std::to_string(given[at]),
           least == most ? text(least, at == 0 ? ", the first token" : ", all tokens")
                         : text(least, "..", most));
  }
}

void check_mask(std::string_view field, const Tensor& mask) {
  const auto count = static_cast<std::size_t>(mask.shape.elements());
  for_each_block(count, [&](std::size_t start, auto size) {
    std::byte any{0};
    for (std::size_t i = 0; i < size; ++i) any |= mask.data[start + i];
    if (any <= std::byte{1}) return;
    for (std::size_t i = start; i < start + size; ++i) {
      if (mask.data[i] > std::byte{1}) {
        refuse(place_text(field, mask, i), text("a byte of ", std::to_integer<int>(mask.data[i])),
               "0 or 1");
      }
    }
  });
}

void bias_of_mask(const Tensor& mask, DataType dtype, std::byte* to) {
  const auto count = static_cast<std::size_t>(mask.shape.elements());
  const auto negative = [](auto infinity) {
    return static_cast<decltype(infinity)>(infinity | kSign<decltype(infinity)>);
  };
  switch (dtype) {
    case DataType::kFp16:
      return hide(mask.data, count, negative(Fp16::kInfinity), to);
    case DataType::kBf16:
      return hide(mask.data, count, negative(Bf16::kInfinity), to);
    default:
      return hide(mask.data, count, negative(Fp32::kInfinity), to);
  }
}

void check_added(std::string_view field, const Tensor& added) {
  const std::optional<Wrong> wrong = find_wrong(added);
  if (!wrong) return;
  refuse(place_text(field, added, wrong->at), wrong->nan ? "nan" : "inf",
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
