// The messages of Decode (proto/attnserve/v1/attention.proto), decoded in place: texts and elements
// are views into the message they were read from, which must outlive what is decoded here.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <variant>
#include <vector>

#include "base/memory.h"
#include "base/status.h"
#include "base/tensor.h"
#include "wire/attention.h"

namespace attnserve::wire {

struct LayerSpec {
  std::optional<std::uint32_t> window;
  std::uint32_t kept_first = 0;
  bool cross = false, latent = false;
  std::vector<float> sinks{};
};

struct ModelOfLayer {
  std::string_view model, version;
};

struct NewSession {
  std::uint64_t max_tokens = 0, reserved_tokens = 0;
  ByteSpan prefix_hashes;
  std::uint64_t cross_tokens = 0;
};

struct OpenSessions {
  std::string_view model, version;
  std::uint32_t num_layers = 0;
  std::vector<LayerSpec> layers;
  std::int32_t cache_type = 0;  // the number on the wire, known or not
  std::uint64_t lease = 0;      // microseconds, as all leases here
  std::vector<NewSession> sessions;
  std::vector<ModelOfLayer> layer_models;
};

struct SessionStep {
  std::string_view session_id;
  std::uint32_t new_tokens = 0;
  std::vector<std::int32_t> parents;
  ByteSpan prefix_hashes;
  std::uint32_t cross_tokens = 0;
};

struct BeginStep {
  std::uint64_t step_id = 0;
  std::vector<SessionStep> sessions;
  std::uint32_t priority = 0;
  bool queries_only = false;
};

struct LayerReturns {
  bool no_output = false, log_sum_exp = false, entropy = false;
  std::vector<std::uint32_t> weights_of;
};

struct AttendLayer {
  std::uint64_t step_id = 0;
  std::uint32_t layer = 0;
  std::optional<TensorMessage> query, key, value, hidden_states;
  std::optional<BeginStep> begin;
  LayerReturns returns;
  std::optional<RegionMessage> output_region;
};

struct AbandonStep {
  std::uint64_t step_id = 0;
};

struct CommitTree {
  std::string_view session_id;
  std::vector<std::uint32_t> accepted;
};

struct TruncateSession {
  std::string_view session_id;
  std::uint64_t length = 0;
};

struct ForkSession {
  std::string_view session_id;
  std::optional<std::uint64_t> length;
  std::uint64_t max_tokens = 0, reserved_tokens = 0, lease = 0;
};

struct RenewSession {
  std::string_view session_id;
  std::uint64_t lease = 0;
};

struct CloseSession {
  std::string_view session_id;
};

struct ExportSession {
  std::string_view session_id;
};

struct SessionChunk {
  std::uint32_t index = 0;
  ByteSpan data;
  bool last = false;
};

struct ImportSession {
  SessionChunk chunk;
  std::uint64_t max_tokens = 0, reserved_tokens = 0, lease = 0;
};

using DecodeAction = std::variant<std::monostate, OpenSessions, BeginStep, AttendLayer, AbandonStep,
                                  CommitTree, TruncateSession, ForkSession, RenewSession,
                                  CloseSession, ExportSession, ImportSession>;

struct DecodeRequest {
  std::uint64_t request_id = 0;
  DecodeAction action;  // std::monostate: none
};

// Throws as decode_attend does. A step of many sessions has many fields: more are allowed.
DecodeRequest decode_decode(ByteSpan message);

struct MovingSession {
  std::string_view caller;
  std::uint64_t lease = 0;
  ByteSpan prefix_hashes;
};

struct MoveSessionRequest {
  SessionChunk chunk;
  std::optional<MovingSession> session;
};

// Likewise.
MoveSessionRequest decode_move_session(ByteSpan message);

struct MovedSession {
  std::string_view session_id, address, authority, new_session_id;
  std::uint64_t length = 0;
};

struct SessionState {
  std::string_view session_id;
  std::uint64_t length = 0, max_tokens = 0, reserved_tokens = 0, lease = 0;
};

Bytes encode_opened(std::uint64_t request_id, std::span<const SessionState> sessions);
Bytes encode_begun(std::uint64_t request_id, std::uint64_t step_id,
                   std::span<const std::int64_t> lengths);
Bytes encode_session(std::uint64_t request_id, const SessionState& session);
Bytes encode_done(std::uint64_t request_id);
// As encode_stream_error.
Bytes encode_decode_error(std::uint64_t request_id, const Status& status);
// The same of a session that is at another server.
Bytes encode_decode_error(std::uint64_t request_id, const Status& status,
                          const MovedSession& moved);
// What answers no request.
Bytes encode_moved(const MovedSession& moved);
// What MoveSession answers.
Bytes encode_session_state(const SessionState& session);
// The head of the message that holds a chunk; its `size` bytes of data come right after.
Bytes encode_session_chunk_head(std::uint64_t request_id, std::uint32_t index, bool last,
                                std::size_t size);

// The tensors of AttendedLayer, in the order of their field numbers.
enum class LayerOutput : std::uint8_t { kOutput, kLogSumExp, kEntropy, kWeights };
constexpr std::size_t kLayerOutputs = 4;

struct LayerResult {
  LayerOutput output;  // kWeights: one for each session that they are asked of
  DataType dtype;
  Shape shape;
  std::size_t byte_size = 0;
};

// A DecodeResponse with an AttendedLayer, laid out before its tensors are computed: as
// AttendAnswer. `lengths`: of the sessions, where the layer began its step.
class LayerAnswer {
 public:
  LayerAnswer(std::uint64_t request_id, std::span<const LayerResult> results,
              std::span<const std::int64_t> lengths);
  // Where the elements of results[i] go: multiples of kAlignment from the message's start.
  std::vector<std::byte*> places;
  Bytes finish(bool step_ended, const Timings& timings) &&;
  Bytes& bytes() { return bytes_; }

 private:
  Bytes bytes_;
  std::size_t tail_ = 0;  // where in bytes_ the rest goes
};

// One whose tensors lie in shared memory, results[i] at places[i].
Bytes encode_attended_layer(std::uint64_t request_id, std::span<const LayerResult> results,
                            std::span<const SharedPlace> places,
                            std::span<const std::int64_t> lengths, bool step_ended,
                            const Timings& timings);

}  // namespace attnserve::wire
