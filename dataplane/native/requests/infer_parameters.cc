#include "requests/infer_parameters.h"

#include <limits>
#include <utility>
#include <variant>

#include "base/text.h"
#include "requests/refusal.h"

namespace attnserve::requests {
namespace {

static_assert(std::numeric_limits<float>::is_iec559,
              "doubles too large for a float become infinity");

constexpr std::uint64_t kMostCount = std::numeric_limits<std::uint32_t>::max();
constexpr std::uint64_t kLowestPriority = kLow;
constexpr std::uint64_t kLongestTimeout = std::numeric_limits<std::int64_t>::max();

// As Python's repr.
std::string value_text(const wire::ParameterValue& value) {
  if (const auto* boolean = std::get_if<bool>(&value)) return *boolean ? "True" : "False";
  if (const auto* integer = std::get_if<std::int64_t>(&value)) return std::to_string(*integer);
  if (const auto* integer = std::get_if<std::uint64_t>(&value)) return std::to_string(*integer);
  if (const auto* number = std::get_if<double>(&value)) return number_text(*number);
  if (const auto* word = std::get_if<std::string_view>(&value)) return shown(*word);
  return "None";
}

float number_of(std::string_view name, const wire::ParameterValue& value) {
  if (const auto* number = std::get_if<double>(&value)) return static_cast<float>(*number);
  // By way of double, as all numbers of this protocol.
  if (const auto* integer = std::get_if<std::int64_t>(&value)) {
    return static_cast<float>(static_cast<double>(*integer));
  }
  if (const auto* integer = std::get_if<std::uint64_t>(&value)) {
    return static_cast<float>(static_cast<double>(*integer));
  }
  refuse_parameter(name, value_text(value), "a number, as double_param or int64_param");
}

std::uint64_t integer_of(std::string_view name, const wire::ParameterValue& value,
                         std::uint64_t most) {
  if (const auto* integer = std::get_if<std::int64_t>(&value)) {
    if (*integer >= 0 && static_cast<std::uint64_t>(*integer) <= most) {
      return static_cast<std::uint64_t>(*integer);
    }
  } else if (const auto* natural = std::get_if<std::uint64_t>(&value)) {
    if (*natural <= most) return *natural;
  }
  refuse_parameter(name, value_text(value), text("0..", most, ", as int64_param"));
}

bool is_integer(const wire::ParameterValue& value) {
  return std::holds_alternative<std::int64_t>(value) ||
         std::holds_alternative<std::uint64_t>(value);
}

bool is_negative(const wire::ParameterValue& value) {
  const auto* integer = std::get_if<std::int64_t>(&value);
  return integer != nullptr && *integer < 0;
}

std::uint64_t unsigned_of(const wire::ParameterValue& value) {
  if (const auto* natural = std::get_if<std::uint64_t>(&value)) return *natural;
  return static_cast<std::uint64_t>(std::get<std::int64_t>(value));
}

// The protocol's numbers have a sign, while regions count from 0 on.
[[noreturn]] void refuse_negative(sessions::SharedRegions& regions, const std::string& owner,
                                  std::string_view name, const std::string& offset,
                                  const std::string& byte_size) {
  regions.view(name, 0, 1, owner);  // throws if there is none
  std::string size;
  for (const sessions::RegionStatus& status : regions.status("", owner)) {
    if (status.name == name) size = text(status.byte_size, " ");
  }
  refuse(text("shared_memory region ", shown(name)),
         text("offset ", offset, " and ", byte_size, " bytes"),
         text("1 or more of its ", size, "bytes"));
}

}  // namespace

InferOptions options_of(const wire::Parameters& parameters) {
  InferOptions options;
  for (const auto& [name, value] : parameters) {
    if (name == "scale") {
      options.scale = number_of(name, value);
    } else if (name == "softcap") {
      options.softcap = number_of(name, value);
    } else if (name == "variant") {
      const auto* word = std::get_if<std::string_view>(&value);
      if (word == nullptr) refuse_parameter(name, value_text(value), "a name, as string_param");
      options.variant = *word;
    } else if (name == "top_k") {
      options.top_k = static_cast<std::uint32_t>(integer_of(name, value, kMostCount));
    } else if (name == "mass_by_distance") {
      options.mass_by_distance = static_cast<std::uint32_t>(integer_of(name, value, kMostCount));
    } else if (name == "priority") {
      options.priority = static_cast<std::uint32_t>(integer_of(name, value, kLowestPriority));
    } else if (name == "timeout") {
      options.timeout = integer_of(name, value, kLongestTimeout);
    }
  }
  return options;
}

void refuse_parameter(std::string_view name, std::string_view given, std::string_view allowed) {
  refuse(text("parameters[", quoted(name), "]"), given, allowed);
}

const wire::ParameterValue* find(const wire::Parameters& parameters, std::string_view name) {
  for (const auto& [given, value] : parameters) {
    if (given == name) return &value;
  }
  return nullptr;
}

std::optional<SharedPlaces::Place> SharedPlaces::find_place(std::string_view tensor,
                                                            const wire::Parameters& parameters) {
  if (parameters.empty()) return std::nullopt;
  const auto& [kRegion, kByteSize, kOffset] = kSharedMemoryParameters;
  const wire::ParameterValue* region = find(parameters, kRegion);
  const wire::ParameterValue* byte_size = find(parameters, kByteSize);
  const wire::ParameterValue* offset = find(parameters, kOffset);
  if (region == nullptr && byte_size == nullptr && offset == nullptr) return std::nullopt;

  const auto given = [](const wire::ParameterValue* value) {
    return value == nullptr ? std::string("None") : value_text(*value);
  };
  const auto field = [&](std::string_view part) {
    return text(first_characters(tensor, kMostShown), ".", part);
  };
  const auto* name = region == nullptr ? nullptr : std::get_if<std::string_view>(region);
  if (name == nullptr || name->empty()) {
    refuse(field(kRegion), given(region), "a registered name, as string_param");
  }
  if (byte_size == nullptr || !is_integer(*byte_size)) {
    refuse(field(kByteSize), given(byte_size), "a number, as int64_param");
  }
  const bool from_start = offset == nullptr || std::holds_alternative<std::monostate>(*offset);
  if (!from_start && !is_integer(*offset)) {
    refuse(field(kOffset), given(offset), "a number, as int64_param");
  }
  const std::string owner = sessions::owner_of(peer_);
  if (is_negative(*byte_size) || (!from_start && is_negative(*offset))) {
    refuse_negative(regions_, owner, *name, from_start ? "0" : given(offset), given(byte_size));
  }
  Place place{{std::string(*name), from_start ? 0 : unsigned_of(*offset), unsigned_of(*byte_size)},
              {}};
  views_.push_back(
      regions_.view(place.region.name, place.region.offset, place.region.byte_size, owner));
  place.bytes = views_.back().bytes;
  return place;
}

}  // namespace attnserve::requests
