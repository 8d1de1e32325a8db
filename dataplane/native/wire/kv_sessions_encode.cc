// Answers of Decode.
#include <utility>

#include "wire/kv_sessions.h"
#include "wire/layout.h"
#include "wire/tensor_fields.h"

namespace attnserve::wire {

namespace {

using protozero::pbf_writer;

// Of DecodeResponse.
constexpr std::uint32_t kOpened = 2, kBegun = 3, kAttended = 4, kSession = 5, kChunk = 6, kDone = 7,
                        kError = 8, kMoved = 9;
constexpr std::uint32_t kErrorMoved = 4;  // of Error
// Of AttendedLayer.
constexpr std::uint32_t kStepEnded = 4, kWeights = 5, kLengths = 6, kPadding = 14, kTimings = 15;
constexpr std::uint32_t kChunkData = 2;  // of SessionChunk

std::uint32_t field_of(LayerOutput output) {
  return output == LayerOutput::kWeights ? kWeights : 1 + static_cast<std::uint32_t>(output);
}

std::string body_of(const SessionState& session) {
  std::string body;
  pbf_writer writer(body);
  add_text(writer, 1, session.session_id);
  add_number(writer, 2, session.length);
  add_number(writer, 3, session.max_tokens);
  add_number(writer, 4, session.reserved_tokens);
  add_number(writer, 5, session.lease);
  return body;
}

std::string body_of(const MovedSession& moved) {
  std::string body;
  pbf_writer writer(body);
  add_text(writer, 1, moved.session_id);
  add_text(writer, 2, moved.address);
  add_text(writer, 3, moved.authority);
  add_text(writer, 4, moved.new_session_id);
  add_number(writer, 5, moved.length);
  return body;
}

void append_lengths(std::string& to, std::uint32_t number, std::span<const std::int64_t> lengths) {
  pbf_writer(to).add_packed_uint64(number, lengths.begin(), lengths.end());
}

// What comes last.
std::string tail_of(bool step_ended, const Timings& timings) {
  std::string tail;
  if (step_ended) pbf_writer(tail).add_bool(kStepEnded, true);
  append_timings(tail, kTimings, timings);
  return tail;
}

}  // namespace

Bytes encode_opened(std::uint64_t request_id, std::span<const SessionState> sessions) {
  std::string opened;
  pbf_writer writer(opened);
  for (const SessionState& session : sessions) writer.add_message(1, body_of(session));
  return stream_message(request_id, kOpened, opened);
}

Bytes encode_begun(std::uint64_t request_id, std::uint64_t step_id,
                   std::span<const std::int64_t> lengths) {
  std::string begun;
  pbf_writer writer(begun);
  add_number(writer, 1, step_id);
  append_lengths(begun, 2, lengths);
  return stream_message(request_id, kBegun, begun);
}

Bytes encode_session(std::uint64_t request_id, const SessionState& session) {
  return stream_message(request_id, kSession, body_of(session));
}

Bytes encode_done(std::uint64_t request_id) { return stream_message(request_id, kDone, {}); }

Bytes encode_decode_error(std::uint64_t request_id, const Status& status) {
  return stream_message(request_id, kError, error_message(status));
}

Bytes encode_decode_error(std::uint64_t request_id, const Status& status,
                          const MovedSession& moved) {
  std::string error = error_message(status);
  pbf_writer(error).add_message(kErrorMoved, body_of(moved));
  return stream_message(request_id, kError, error);
}

Bytes encode_moved(const MovedSession& moved) { return stream_message(0, kMoved, body_of(moved)); }

Bytes encode_session_state(const SessionState& session) { return bytes_of(body_of(session)); }

Bytes encode_session_chunk_head(std::uint64_t request_id, std::uint32_t index, bool last,
                                std::size_t size) {
  std::string chunk;
  pbf_writer writer(chunk);
  add_number(writer, 1, index);
  if (last) writer.add_bool(3, true);
  append_length(chunk, kChunkData, size);
  std::string message = stream_head(request_id);
  append_length(message, kChunk, chunk.size() + size);
  return bytes_of(message + chunk);
}

LayerAnswer::LayerAnswer(std::uint64_t request_id, std::span<const LayerResult> results,
                         std::span<const std::int64_t> lengths) {
  std::size_t held = 0;  // bytes of elements
  for (const LayerResult& result : results) held += result.byte_size;
  const Frame frame = enclose(stream_head(request_id), kAttended, held, [&](std::size_t before) {
    Frame inside(kPadding, before);
    for (const LayerResult& result : results) {
      add_tensor(inside, field_of(result.output), result.dtype, result.shape, result.byte_size);
    }
    append_lengths(inside.text(), kLengths, lengths);
    tail_ = inside.size();
    inside.text().append(kTimingsRoom, '\0');
    return inside;
  });
  bytes_ = frame.write(places);
}

Bytes LayerAnswer::finish(bool step_ended, const Timings& timings) && {
  fill_tail(bytes_, tail_, tail_of(step_ended, timings), kPadding);
  return std::move(bytes_);
}

Bytes encode_attended_layer(std::uint64_t request_id, std::span<const LayerResult> results,
                            std::span<const SharedPlace> places,
                            std::span<const std::int64_t> lengths, bool step_ended,
                            const Timings& timings) {
  std::string attended;
  for (std::size_t index = 0; index < results.size(); ++index) {
    const LayerResult& result = results[index];
    append_shared_tensor(attended, field_of(result.output), result.dtype, result.shape,
                         result.byte_size, places[index]);
  }
  append_lengths(attended, kLengths, lengths);
  attended += tail_of(step_ended, timings);
  return stream_message(request_id, kAttended, attended);
}

}  // namespace attnserve::wire
