#include "requests/tensor_spec.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "base/text.h"
#include "requests/refusal.h"
#include "requests/wide.h"

namespace attnserve::requests {
namespace {

constexpr std::uint64_t kTooManyBytes = 1ULL << 63;

// The name of a dtype on the wire, or its number if it has none.
std::string dtype_text(std::int32_t number) {
  if (number < 0 || number > static_cast<std::int32_t>(DataType::kBool)) {
    return std::to_string(number);
  }
  return std::string(name_of(static_cast<DataType>(number)));
}

std::string wanted_dtype(const TensorRule& rule) {
  if (rule.dtype == DataType::kUnspecified) return "a dtype";
  if (rule.also == DataType::kUnspecified) return std::string(name_of(rule.dtype));
  return text(name_of(rule.dtype), " or ", name_of(rule.also));
}

DataType checked_dtype(const TensorRule& rule, std::int32_t number) {
  const bool known = number > 0 && number <= static_cast<std::int32_t>(DataType::kBool);
  const DataType given = known ? static_cast<DataType>(number) : DataType::kUnspecified;
  const bool wanted = rule.dtype == DataType::kUnspecified
                          ? known
                          : known && (given == rule.dtype || given == rule.also);
  if (!wanted) refuse(text(rule.field, ".dtype"), dtype_text(number), wanted_dtype(rule));
  return given;
}

// The bytes that a shape takes.
std::size_t checked_shape(const TensorRule& rule, std::span<const std::int64_t> shape,
                          DataType dtype) {
  const auto field = [&] { return text(rule.field, ".shape"); };
  const auto wanted = [&] {
    return rule.dims.empty() ? text("1..", kMostDimensions, " dimensions") : dims_text(rule.dims);
  };
  if (!rule.dims.empty() && shape.size() != rule.dims.size()) {
    refuse(field(), text(shown(shape), " of rank ", shape.size()),
           text("rank ", rule.dims.size(), ", ", wanted()));
  }
  if (shape.size() > kMostDimensions) {
    refuse(field(), text("one of rank ", shape.size()), wanted());
  }
  if (shape.empty() || *std::min_element(shape.begin(), shape.end()) < 1) {
    refuse(field(), shown(shape), text(wanted(), ", each at least 1"));
  }
  std::uint64_t bytes = item_bytes(dtype);
  bool too_many = false;
  for (const std::int64_t size : shape) {
    too_many |= __builtin_mul_overflow(bytes, static_cast<std::uint64_t>(size), &bytes);
  }
  if (too_many || bytes >= kTooManyBytes) {
    std::vector<std::int64_t> factors(shape.begin(), shape.end());
    factors.push_back(static_cast<std::int64_t>(item_bytes(dtype)));
    refuse(field(), text(list_text(shape), ", ", product_text(factors), " bytes"),
           "less than 2^63 bytes");
  }
  return bytes;
}

// Its dtype and shape are as it was put, and may be left out of the message.
TensorSpec check_stored(const TensorRule& rule, const wire::TensorMessage& tensor,
                        const sessions::StoredOf& stored) {
  sessions::StoredTensorPtr found =
      stored.store.get(tensor.stored, stored.owner, text(rule.field, ".stored"));
  const auto number = static_cast<std::int32_t>(found->dtype);
  for (const std::int32_t given :
       {std::min(tensor.dtype, number), std::max(tensor.dtype, number)}) {
    if (given != 0) checked_dtype(rule, given);
  }
  const std::span<const std::int64_t> shape = found->shape.sizes();
  if (!tensor.shape.empty() && !std::ranges::equal(tensor.shape, shape)) {
    refuse(text(rule.field, ".shape"), shown(tensor.shape),
           text(list_text(shape), ", as it was put"));
  }
  TensorSpec spec;
  spec.dtype = found->dtype;
  spec.byte_size = checked_shape(rule, shape, found->dtype);
  spec.shape = found->shape;
  spec.stored = std::move(found);
  return spec;
}

}  // namespace

std::string dims_text(std::span<const std::string_view> dims) {
  std::string joined = "[";
  for (const std::string_view dim : dims) {
    if (joined.size() > 1) joined += ", ";
    joined += dim;
  }
  return joined += ']';
}

Region region_of(std::string_view field, const wire::RegionMessage& message) {
  if (message.name.empty()) {
    refuse(text(field, ".name"), "nothing", "a name that RegisterSharedMemory answered");
  }
  if (message.offset % kAlignment != 0) {
    refuse(text(field, ".offset"), std::to_string(message.offset),
           text("a multiple of ", kAlignment));
  }
  return {std::string(message.name), message.offset, message.byte_size};
}

sessions::RegionView view_of(const Region& region, const sessions::SharedRegions& regions,
                             std::string_view peer) {
  return regions.view(region.name, region.offset, region.byte_size, sessions::owner_of(peer));
}

ByteSpan elements_of(const TensorSpec& spec, ByteSpan sent, const sessions::SharedRegions& regions,
                     std::string_view peer, std::vector<sessions::RegionView>& views) {
  ByteSpan elements = sent;
  if (spec.stored) {
    elements = spec.stored->elements.span();
  } else if (spec.region) {
    elements = views.emplace_back(view_of(*spec.region, regions, peer)).bytes;
  }
  if (elements.size() != spec.byte_size) {
    throw std::logic_error("elements of another size than was planned");
  }
  return elements;
}

TensorSpec check_tensor(const TensorRule& rule, const wire::TensorMessage& tensor,
                        bool chunks_allowed, const sessions::StoredOf* stored) {
  using Content = wire::TensorMessage::Content;
  if (tensor.content == Content::kStored && stored != nullptr) {
    return check_stored(rule, tensor, *stored);
  }
  TensorSpec spec;
  spec.dtype = checked_dtype(rule, tensor.dtype);
  spec.byte_size = checked_shape(rule, tensor.shape, spec.dtype);
  spec.shape = Shape(tensor.shape);
  const auto compare = [&](std::string_view part, std::uint64_t given) {
    if (given == spec.byte_size) return;
    refuse(text(rule.field, part), text(given, " bytes"),
           text(spec.byte_size, " bytes, as shape ", list_text(tensor.shape), " of ",
                name_of(spec.dtype), " takes"));
  };
  switch (tensor.content) {
    case Content::kNone:
      refuse(text(rule.field, ".data"), "nothing", text(spec.byte_size, " bytes"));
    case Content::kStored:
      refuse(text(rule.field, ".stored"), first_characters(tensor.stored, 80), "data");
    case Content::kData:
      compare(".data", tensor.data.size());
      break;
    case Content::kChunked:
      if (!chunks_allowed) {
        refuse(text(rule.field, ".chunked"), "set", "data; chunks go over AttendStream");
      }
      compare(".chunked.byte_size", tensor.chunked_bytes);
      spec.chunked = true;
      break;
    case Content::kSharedMemory:
      compare(".shared_memory.byte_size", tensor.region.byte_size);
      spec.region = region_of(text(rule.field, ".shared_memory"), tensor.region);
      break;
  }
  return spec;
}

}  // namespace attnserve::requests
