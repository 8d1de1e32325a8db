#include "wire/contents.h"

#include <cstring>
#include <limits>

#include "base/copy.h"

namespace attnserve::wire {

namespace {

struct ContentsField {
  std::string_view name;
  DataType dtype;
};

constexpr std::array<ContentsField, kContentsFields> kFields{{
    {"bool_contents", DataType::kBool},
    {"int_contents", DataType::kInt32},
    {"int64_contents", DataType::kInt64},
    {"uint_contents", DataType::kUnspecified},
    {"uint64_contents", DataType::kUnspecified},
    {"fp32_contents", DataType::kFp32},
    {"fp64_contents", DataType::kUnspecified},
    {"bytes_contents", DataType::kUnspecified},
}};

std::size_t count_packed(const FieldReader& reader) {
  std::size_t count = 0;
  for (Numbers elements = reader.packed(); !elements.empty(); ++count) elements.varint();
  return count;
}

std::size_t count_fixed(const FieldReader& reader, std::size_t element_bytes) {
  const std::size_t size = reader.bytes().size();
  if (size % element_bytes != 0) reader.decoding().refuse("an element that is cut off");
  return size / element_bytes;
}

// How many elements the current field holds; 0 for one that is not of InferTensorContents.
std::size_t count(const FieldReader& reader) {
  switch (reader.key()) {
    case varint_field(1):
    case varint_field(2):
    case varint_field(3):
    case varint_field(4):
    case varint_field(5):
    case fixed32_field(6):
    case fixed64_field(7):
    case bytes_field(8):
      return 1;
    case bytes_field(1):
    case bytes_field(2):
    case bytes_field(3):
    case bytes_field(4):
    case bytes_field(5):
      return count_packed(reader);
    case bytes_field(6):
      return count_fixed(reader, sizeof(float));
    case bytes_field(7):
      return count_fixed(reader, sizeof(double));
    default:
      return 0;
  }
}

template <class T>
std::byte* put(std::byte* to, T element) {
  std::memcpy(to, &element, sizeof(element));
  return to + sizeof(element);
}

std::byte* put(std::byte* to, DataType dtype, std::uint64_t element) {
  switch (dtype) {
    case DataType::kBool:
      return put(to, static_cast<std::uint8_t>(element != 0));
    case DataType::kInt64:
      return put(to, element);
    default:  // kInt32, and the bits of kFp32
      return put(to, static_cast<std::uint32_t>(element));
  }
}

// Writes the elements of field `number` that one InferTensorContents holds; gives where they end.
std::byte* gather_one(FieldReader reader, std::uint32_t number, DataType dtype, std::byte* to) {
  const bool fixed = dtype == DataType::kFp32;
  const std::uint32_t single = fixed ? fixed32_field(number) : varint_field(number);
  while (reader.next()) {
    if (reader.key() == single) {
      to = put(to, dtype, reader.number());
    } else if (reader.key() == bytes_field(number)) {
      const ByteSpan packed = reader.bytes();
      if (fixed && !packed.empty()) {
        copy_bytes(to, packed.data(), packed.size());
        to += packed.size();
        continue;
      }
      for (Numbers elements = reader.packed(); !elements.empty();) {
        to = put(to, dtype, elements.varint());
      }
    }
  }
  return to;
}

Bytes charged(std::size_t size, ByteBudget* budget) {
  Lease lease;
  if (budget != nullptr) {
    lease = Lease(*budget);
    lease.grow_or_throw(size);
  }
  Bytes bytes = Bytes::allocate(size);
  bytes.lease = std::move(lease);
  return bytes;
}

}  // namespace

void ContentsReader::add(ByteSpan body, FieldReader reader) {
  bodies_.push_back(body);
  while (reader.next()) {
    const std::size_t more = count(reader);
    if (more != 0) counts_[(reader.key() >> 3) - 1] += more;
  }
}

Contents ContentsReader::gather(ByteBudget* budget) const {
  Contents contents;
  std::uint32_t number = 0;
  for (std::uint32_t field = 0; field < kContentsFields; ++field) {
    if (counts_[field] == 0) continue;
    contents.fields.push_back(kFields[field].name);
    number = field + 1;
  }
  if (contents.fields.size() != 1) return contents;
  contents.count = counts_[number - 1];
  contents.dtype = kFields[number - 1].dtype;
  if (contents.dtype == DataType::kUnspecified) return contents;
  contents.elements = charged(contents.count * item_bytes(contents.dtype), budget);
  // Read once already: whatever is to be refused has been.
  Decoding decoding("ModelInfer", {std::numeric_limits<std::size_t>::max()});
  std::byte* to = contents.elements.data();
  for (const ByteSpan body : bodies_) {
    to = gather_one(FieldReader(body, decoding), number, contents.dtype, to);
  }
  return contents;
}

}  // namespace attnserve::wire
