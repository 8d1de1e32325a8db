#include "engine/joining.h"

#include <algorithm>
#include <cstring>
#include <optional>

namespace attnserve::engine {
namespace {

// Along which axes works of one key may differ.
enum class Axis : std::uint8_t { kBatch, kQueryLen, kKeyLen, kSame };
using Axes = std::span<const Axis>;

constexpr Axis kBatchHeadsQueries[] = {Axis::kBatch, Axis::kSame, Axis::kQueryLen, Axis::kSame};
constexpr Axis kBatchHeadsKeys[] = {Axis::kBatch, Axis::kSame, Axis::kKeyLen, Axis::kSame};
constexpr Axis kBatchQueries[] = {Axis::kBatch, Axis::kQueryLen, Axis::kSame};
constexpr Axis kBatchKeys[] = {Axis::kBatch, Axis::kKeyLen, Axis::kSame};
constexpr Axis kWeightsAxes[] = {Axis::kBatch, Axis::kSame, Axis::kQueryLen, Axis::kKeyLen};
constexpr Axis kByHead[] = {Axis::kBatch, Axis::kSame, Axis::kSame};

// None: alike in all works of a key (a softcap, a count, the model's sinks, the bias or mask that
// is none).
std::optional<Axes> axes_of(Feed feed) {
  switch (feed) {
    case Feed::kQuery:
      return kBatchHeadsQueries;
    case Feed::kKey:
    case Feed::kValue:
      return kBatchHeadsKeys;
    case Feed::kHiddenStates:
      return kBatchQueries;
    case Feed::kContext:
      return kBatchKeys;
    case Feed::kKeyLengths:
    case Feed::kPrefixLengths:
      return Axes(kByHead).first(1);
    case Feed::kBias:
    case Feed::kSinks:
    case Feed::kMask:
    case Feed::kCuSeqlensQ:
    case Feed::kCuSeqlensK:
    case Feed::kSoftcap:
    case Feed::kTopK:
    case Feed::kDistances:
      break;
  }
  return std::nullopt;
}

Axes axes_of(Result result, bool of_layer) {
  switch (result) {
    case Result::kOutput:
      return of_layer ? Axes(kBatchQueries) : Axes(kBatchHeadsQueries);
    case Result::kWeights:
      return kWeightsAxes;
    case Result::kEntropy:
    case Result::kLogSumExp:
      return Axes(kBatchHeadsQueries).first(3);
    case Result::kTopKIndices:
    case Result::kTopKWeights:
      return kBatchHeadsQueries;
    case Result::kMassPerKey:
      return Axes(kBatchHeadsKeys).first(3);
    case Result::kMassByDistance:
      break;
  }
  return kByHead;
}

// A shape with the sizes of `dims` along the axes that differ.
Shape resized(Shape shape, Axes axes, const Dims& dims) {
  for (std::size_t axis = 0; axis < axes.size(); ++axis) {
    if (axes[axis] == Axis::kBatch) shape[axis] = dims.batch;
    if (axes[axis] == Axis::kQueryLen) shape[axis] = dims.query_len;
    if (axes[axis] == Axis::kKeyLen) shape[axis] = dims.key_len;
  }
  return shape;
}

// Copies between elements that lie close together, and the same ones among padding: along each axis
// the first of more. `kPad`: towards the padded ones, setting what is between to 0.
template <bool kPad>
class PaddedCopy {
 public:
  PaddedCopy(const Shape& close, const Shape& padded, std::size_t item)
      : close_(close), padded_(padded) {
    // Bytes of one step along each axis; axes from `whole_from_` on are alike.
    std::size_t close_step = item, padded_step = item;
    whole_from_ = close.rank();
    for (std::size_t axis = close.rank(); axis-- > 0;) {
      close_steps_[axis] = close_step;
      padded_steps_[axis] = padded_step;
      close_step *= static_cast<std::size_t>(close[axis]);
      padded_step *= static_cast<std::size_t>(padded[axis]);
      if (whole_from_ == axis + 1 && close[axis] == padded[axis]) whole_from_ = axis;
    }
    whole_bytes_ = whole_from_ == 0 ? close_step : close_steps_[whole_from_ - 1];
  }

  void operator()(std::byte* close, std::byte* padded, std::size_t axis = 0) const {
    if (axis == whole_from_) {
      std::memcpy(kPad ? padded : close, kPad ? close : padded, whole_bytes_);
      return;
    }
    const auto size = static_cast<std::size_t>(close_[axis]);
    for (std::size_t i = 0; i < size; ++i) {
      (*this)(close + i * close_steps_[axis], padded + i * padded_steps_[axis], axis + 1);
    }
    if constexpr (kPad) {
      const std::size_t rest = static_cast<std::size_t>(padded_[axis]) - size;
      std::memset(padded + size * padded_steps_[axis], 0, rest * padded_steps_[axis]);
    }
  }

 private:
  Shape close_, padded_;
  std::array<std::size_t, kMostDimensions> close_steps_{}, padded_steps_{};
  std::size_t whole_from_ = 0, whole_bytes_ = 0;
};

// Copies each work's part of a joint tensor, `part(work)`, one after another along the batch.
template <bool kPad, class Part>
void copy_parts(std::span<AttendWork* const> works, const Tensor& joint, Part part) {
  std::byte* rows = joint.data;
  for (AttendWork* work : works) {
    const Tensor& close = part(*work);
    Shape padded = joint.shape;
    padded[0] = close.shape[0];
    const std::size_t item = item_bytes(joint.dtype);
    PaddedCopy<kPad>(close.shape, padded, item)(close.data, rows);
    rows += static_cast<std::size_t>(padded.elements()) * item;
  }
}

Dims joint_dims(std::span<AttendWork* const> works) {
  Dims dims = works.front()->dims;
  dims.batch = 0;
  for (const AttendWork* work : works) {
    dims.batch += work->dims.batch;
    dims.query_len = std::max(dims.query_len, work->dims.query_len);
    dims.key_len = std::max(dims.key_len, work->dims.key_len);
  }
  return dims;
}

}  // namespace

JoinedWork::JoinedWork(std::span<AttendWork* const> works) : works_(works) {
  const AttendWork& first = *works.front();
  joint_.model = first.model;
  joint_.variant = first.variant;
  joint_.diagnosis = first.diagnosis;
  joint_.wanted = first.wanted;
  joint_.dims = joint_dims(works);
  const auto make_room = [this](Tensor like, Axes axes) {
    like.shape = resized(like.shape, axes, joint_.dims);
    like.data = memory_.emplace_back(Bytes::allocate(like.byte_size())).data();
    return like;
  };
  for (std::size_t i = 0; i < kFeeds; ++i) {
    const std::optional<Axes> axes = axes_of(static_cast<Feed>(i));
    joint_.feeds[i] = first.feeds[i];
    if (first.feeds[i].data == nullptr || !axes) continue;
    joint_.feeds[i] = make_room(first.feeds[i], *axes);
    copy_parts<true>(works, joint_.feeds[i], [&](auto& work) -> auto& { return work.feeds[i]; });
  }
  const bool of_layer = first.feeds[static_cast<std::size_t>(Feed::kHiddenStates)].data != nullptr;
  for (std::size_t i = 0; i < kResults; ++i) {
    if (first.results[i].data == nullptr) continue;
    joint_.results[i] = make_room(first.results[i], axes_of(static_cast<Result>(i), of_layer));
  }
}

void JoinedWork::share() const {
  for (std::size_t i = 0; i < kResults; ++i) {
    if (joint_.results[i].data == nullptr) continue;
    copy_parts<false>(works_, joint_.results[i],
                      [&](auto& work) -> auto& { return work.results[i]; });
  }
}

}  // namespace attnserve::engine
