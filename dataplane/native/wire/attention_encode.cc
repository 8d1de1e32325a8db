// Answers of attnserve.v1.
#include <utility>

#include "wire/attention.h"
#include "wire/fields.h"
#include "wire/layout.h"
#include "wire/tensor_fields.h"

namespace attnserve::wire {

namespace {

using protozero::pbf_writer;

constexpr std::uint32_t kResponse = 2, kChunk = 3, kError = 4;  // of AttendStreamResponse
constexpr std::uint32_t kResponsePadding = 14, kTimings = 15;   // of AttendResponse
constexpr std::uint32_t kChunkData = 3, kChunkPadding = 4;      // of TensorChunk

void append_names(std::string& to, std::string_view model, std::string_view version,
                  std::string_view variant) {
  pbf_writer writer(to);
  add_text(writer, 1, model);
  add_text(writer, 2, version);
  add_text(writer, 3, variant);
}

}  // namespace

AttendAnswer::AttendAnswer(std::string_view model, std::string_view version,
                           std::string_view variant, std::span<const ResultSpec> results,
                           std::optional<std::uint64_t> stream_id, std::size_t inline_bytes) {
  const auto is_inline = [inline_bytes](const ResultSpec& result) {
    return result.byte_size <= inline_bytes;
  };
  std::size_t held = 0;  // bytes of elements within the message
  for (const ResultSpec& result : results) held += is_inline(result) ? result.byte_size : 0;
  const auto lay_out = [&](std::size_t before) {
    Frame frame(kResponsePadding, before);
    append_names(frame.text(), model, version, variant);
    for (const ResultSpec& result : results) {
      const std::uint32_t number = field_of(result.output);
      if (is_inline(result)) {
        add_tensor(frame, number, result.dtype, result.shape, result.byte_size);
      } else {
        append_chunked_tensor(frame.text(), number, result.dtype, result.shape, result.byte_size);
      }
    }
    tail_ = frame.size();
    frame.text().append(kTimingsRoom, '\0');
    return frame;
  };
  const Frame frame =
      stream_id ? enclose(stream_head(*stream_id), kResponse, held, lay_out) : lay_out(0);
  std::vector<std::byte*> rooms;
  bytes_ = frame.write(rooms);
  auto room = rooms.begin();
  for (const ResultSpec& result : results) places.push_back(is_inline(result) ? *room++ : nullptr);
}

Bytes AttendAnswer::finish(const Timings& timings) && {
  std::string tail;
  append_timings(tail, kTimings, timings);
  fill_tail(bytes_, tail_, std::move(tail), kResponsePadding);
  return std::move(bytes_);
}

Bytes encode_attend_response(std::string_view model, std::string_view version,
                             std::string_view variant, std::span<const ResultSpec> results,
                             std::span<const SharedPlace> places, const Timings& timings,
                             std::optional<std::uint64_t> stream_id) {
  std::string response;
  append_names(response, model, version, variant);
  for (std::size_t index = 0; index < results.size(); ++index) {
    const ResultSpec& result = results[index];
    append_shared_tensor(response, field_of(result.output), result.dtype, result.shape,
                         result.byte_size, places[index]);
  }
  append_timings(response, kTimings, timings);
  return stream_id ? stream_message(*stream_id, kResponse, response) : bytes_of(response);
}

Bytes encode_chunk_head(std::uint64_t request_id, Output output, std::uint64_t offset,
                        std::size_t size) {
  const std::string head = stream_head(request_id);
  std::string start;
  pbf_writer writer(start);
  add_number(writer, 1, field_of(output));
  add_number(writer, 2, offset);
  const std::size_t end = length_bytes(kChunkData, size);
  for (std::size_t width = varint_bytes(size);; ++width) {
    const std::size_t before = head.size() + tag_bytes(kChunk) + width;
    std::size_t padding = padding_of(before + start.size() + end, kChunkPadding);
    const auto inside = [&] { return start.size() + padding + end + size; };
    if (varint_bytes(inside()) > width) continue;
    // With one byte more before it, it may need less padding, and then one byte less for its
    // length.
    while (varint_bytes(inside()) < width) padding += kAlignment;
    std::string message = head;
    append_length(message, kChunk, inside());
    message += start;
    if (padding != 0) append_padding(message, kChunkPadding, padding);
    append_length(message, kChunkData, size);
    return bytes_of(message);
  }
}

Bytes encode_stream_error(std::uint64_t request_id, const Status& status) {
  return stream_message(request_id, kError, error_message(status));
}

Bytes encode_stored_tensor(std::string_view handle, std::uint64_t lease_microseconds,
                           std::uint64_t byte_size) {
  std::string message;
  pbf_writer writer(message);
  add_text(writer, 1, handle);
  add_number(writer, 2, lease_microseconds);
  add_number(writer, 3, byte_size);
  return bytes_of(message);
}

Bytes encode_register_shared_memory(std::string_view name) {
  std::string message;
  pbf_writer writer(message);
  add_text(writer, 1, name);
  return bytes_of(message);
}

Bytes encode_empty() { return {}; }

}  // namespace attnserve::wire
