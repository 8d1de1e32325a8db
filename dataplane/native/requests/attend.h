// The checks of an attention request, whichever protocol it came by: the one place for them.
//
// In two steps. `plan_attend` checks everything that can be checked without the tensors' elements,
// so that a stream's request is refused before its chunks arrive. `prepare` checks the elements,
// adds what the request left out, and makes the work for the engine. Order of checks, codes and
// messages are part of the API: docs/errors.md.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/memory.h"
#include "base/tensor.h"
#include "engine/attend.h"
#include "engine/model.h"
#include "requests/limits.h"
#include "sessions/shared_memory.h"
#include "sessions/stored_tensors.h"
#include "wire/attention.h"

namespace attnserve::requests {

// Part of a shared-memory region, its bounds yet to be compared with the region's.
struct Region {
  std::string name;
  std::uint64_t offset = 0, byte_size = 0;
};

// A tensor of a request that has been checked but for its elements.
struct TensorSpec {
  DataType dtype = DataType::kUnspecified;
  Shape shape;
  std::size_t byte_size = 0;
  bool chunked = false;              // its elements follow in chunks
  sessions::StoredTensorPtr stored;  // or were stored before
  std::optional<Region> region;      // or lie in shared memory
  bool sent() const { return !stored && !region; }
};

constexpr std::uint32_t kHigh = 1, kNormal = 2, kLow = 3;  // priorities

// A request that has been checked but for its elements. A value; needs the message no more.
struct AttendPlan {
  engine::ModelPtr model;
  const engine::Variant* variant = nullptr;
  const engine::Variant* diagnosis = nullptr;
  engine::Wanted wanted;
  engine::Dims dims;
  std::array<std::optional<TensorSpec>, wire::kInputs> specs;
  double query_factor = 1.0;              // query is multiplied by it to give the scale asked for
  std::optional<float> softcap;           // other than the model's own
  std::vector<wire::ResultSpec> results;  // of the answer, in the order of their field numbers
  std::size_t request_bytes = 0, response_bytes = 0;  // of all tensors
  std::size_t sent_bytes = 0;                         // of those that come with the request
  std::size_t working_bytes = 0;                      // estimated, while it runs
  std::uint32_t priority = kNormal;
  std::optional<Region> output_region;  // where the answer's tensors go; none: into the answer
  engine::BatchKey key{};
};

// What the checks look things up in. All outlive the requests.
struct Context {
  const engine::ModelStore& models;
  const Limits& limits;
  sessions::StoredTensors& stored;
  sessions::SharedRegions& regions;
};

// `peer` as CallInfo has it. Throws RequestError with the field, what was given and what is
// allowed.
AttendPlan plan_attend(const wire::AttendRequest& message, const Context& context,
                       std::string_view peer, bool chunks_allowed);

// Where tensors lie that follow one another from 0 on, each at the next multiple of kAlignment; the
// last entry is where the last one ends.
std::vector<std::uint64_t> offsets(std::span<const std::size_t> byte_sizes);
std::vector<std::uint64_t> offsets(const std::vector<wire::ResultSpec>& results);

// An attention that is ready to run, with everything that its work views: alive as long as this is.
// Never moves, since work views into it.
class PreparedAttend {
 public:
  PreparedAttend() = default;
  PreparedAttend(const PreparedAttend&) = delete;
  PreparedAttend& operator=(const PreparedAttend&) = delete;

  AttendPlan plan;
  engine::AttendWork work;                    // its results are set by whoever answers
  std::vector<sessions::RegionView> regions;  // of inputs and of the output region, if any
  std::optional<sessions::RegionView> output_region;

  // After the run: throws RequestError if shared memory vanished under it.
  void check_intact() const;

  // Memory that the work views beside the caller's: what had to be changed, what had to be looked
  // at and was unaligned, and what the request left out.
  std::vector<Bytes> copies;
  struct Defaults {
    using Lengths = std::array<std::int64_t, 8>;  // of as many sequences or fewer
    Lengths key_lengths, prefix_lengths;
    std::int64_t top_k, distances;
    float softcap;
    float bias;  // zero, as in every other dtype
    bool mask = true;
  } defaults{};
  std::vector<std::shared_ptr<const void>> owners;
};

// Checks the elements. `elements[i]`: of the inputs that were sent, by wire::Input, as long as the
// plan says; they must live as long as what is returned (or be handed over as `owners`). `peer` as
// CallInfo has it. Throws RequestError: an element out of range, a region that is not the caller's
// or too small.
std::unique_ptr<PreparedAttend> prepare(AttendPlan plan,
                                        const std::array<ByteSpan, wire::kInputs>& elements,
                                        const Context& context, std::string_view peer);

}  // namespace attnserve::requests
