// Whether what was decoded is what protobuf decoded: messages that several tests have.
#pragma once

#include <algorithm>
#include <optional>

#include "attnserve/v1/attention.pb.h"
#include "wire/attention.h"
#include "wire_support.h"

namespace attnserve::wire::tests {

namespace pb = ::attnserve::v1;

inline bool same(const RegionMessage& ours, const pb::SharedMemoryRegion& theirs) {
  return ours.name == theirs.name() && ours.offset == theirs.offset() &&
         ours.byte_size == theirs.byte_size();
}

inline bool same(const TensorMessage& ours, const pb::Tensor& theirs) {
  using Content = TensorMessage::Content;
  if (ours.dtype != theirs.dtype() || !std::equal(ours.shape.begin(), ours.shape.end(),
                                                  theirs.shape().begin(), theirs.shape().end())) {
    return false;
  }
  switch (theirs.content_case()) {
    case pb::Tensor::kData:
      return ours.content == Content::kData && text_of(ours.data) == theirs.data();
    case pb::Tensor::kSharedMemory:
      return ours.content == Content::kSharedMemory && same(ours.region, theirs.shared_memory());
    case pb::Tensor::kChunked:
      return ours.content == Content::kChunked &&
             ours.chunked_bytes == theirs.chunked().byte_size();
    case pb::Tensor::kStored:
      return ours.content == Content::kStored && ours.stored == theirs.stored();
    default:
      return ours.content == Content::kNone;
  }
}

template <class Ours, class Theirs>
bool same(const std::optional<Ours>& ours, bool there, const Theirs& theirs) {
  return ours.has_value() == there && (!there || same(*ours, theirs));
}

}  // namespace attnserve::wire::tests
