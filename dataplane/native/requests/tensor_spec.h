// One `Tensor` message: is it well formed, and where are its elements.
#pragma once

#include <span>
#include <string_view>
#include <vector>

#include "base/tensor.h"
#include "requests/attend.h"
#include "sessions/shared_memory.h"
#include "sessions/stored_tensors.h"
#include "wire/attention.h"

namespace attnserve::requests {

// What a tensor must be.
struct TensorRule {
  std::string_view field;                    // for messages
  DataType dtype = DataType::kUnspecified;   // kUnspecified: any
  std::span<const std::string_view> dims{};  // names of its dimensions; none: any rank from 1 to 8
  DataType also = DataType::kUnspecified;    // a second one that it may be
};

// Checks one tensor but for its elements. `stored` finds stored tensors; nullptr: there are none.
// Throws RequestError INVALID_ARGUMENT, or NOT_FOUND for a stored tensor that is not there.
TensorSpec check_tensor(const TensorRule& rule, const wire::TensorMessage& tensor,
                        bool chunks_allowed, const sessions::StoredOf* stored);

// Throws RequestError INVALID_ARGUMENT for a name or an offset that cannot be right.
Region region_of(std::string_view field, const wire::RegionMessage& message);

// The bytes of a region that a request's caller may use. Throws as SharedRegions::view.
sessions::RegionView view_of(const Region& region, const sessions::SharedRegions& regions,
                             std::string_view peer);
// Where the elements of a tensor are that was checked: `sent`, those of its message, or stored, or
// in shared memory, whose view joins `views` and must live as long. Throws as view_of.
ByteSpan elements_of(const TensorSpec& spec, ByteSpan sent, const sessions::SharedRegions& regions,
                     std::string_view peer, std::vector<sessions::RegionView>& views);

// "[B, H, Sq, D]".
std::string dims_text(std::span<const std::string_view> dims);

}  // namespace attnserve::requests
