#include "wire/tensor_fields.h"

#include <cstring>

namespace attnserve::wire {

namespace {

using protozero::pbf_writer;

constexpr std::uint32_t kData = 3, kShared = 4, kChunked = 5;  // of Tensor

// A Tensor without its content.
std::string header_of(DataType dtype, const Shape& shape) {
  std::string header;
  pbf_writer writer(header);
  if (dtype != DataType::kUnspecified) writer.add_enum(1, static_cast<std::int32_t>(dtype));
  const auto sizes = shape.sizes();
  writer.add_packed_int64(2, sizes.begin(), sizes.end());
  return header;
}

}  // namespace

void merge(FieldReader reader, RegionMessage& region) {
  while (reader.next()) {
    switch (reader.key()) {
      case bytes_field(1):
        region.name = reader.text();
        break;
      case varint_field(2):
        region.offset = reader.number();
        break;
      case varint_field(3):
        region.byte_size = reader.number();
        break;
    }
  }
}

void merge(FieldReader reader, TensorMessage& tensor) {
  using Content = TensorMessage::Content;
  while (reader.next()) {
    switch (reader.key()) {
      case varint_field(1):
        tensor.dtype = static_cast<std::int32_t>(reader.number32());
        break;
      case varint_field(2):
        tensor.shape.push_back(static_cast<std::int64_t>(reader.number()));
        break;
      case bytes_field(2):
        append_packed(reader, "a shape of too many dimensions", tensor.shape);
        break;
      case bytes_field(3):
        tensor.content = Content::kData;
        tensor.data = reader.bytes();
        break;
      case bytes_field(4):
        if (tensor.content != Content::kSharedMemory) tensor.region = {};
        tensor.content = Content::kSharedMemory;
        merge(reader.message(), tensor.region);
        break;
      case bytes_field(5):
        if (tensor.content != Content::kChunked) tensor.chunked_bytes = 0;
        tensor.content = Content::kChunked;
        for (FieldReader chunked = reader.message(); chunked.next();) {
          if (chunked.key() == varint_field(1)) tensor.chunked_bytes = chunked.number();
        }
        break;
      case bytes_field(6):
        tensor.content = Content::kStored;
        tensor.stored = reader.text();
        break;
    }
  }
}

void add_tensor(Frame& to, std::uint32_t number, DataType dtype, const Shape& shape,
                std::size_t byte_size) {
  const std::string header = header_of(dtype, shape);
  std::string head;
  append_length(head, number, header.size() + length_bytes(kData, byte_size) + byte_size);
  head += header;
  append_length(head, kData, byte_size);
  to.add_room(head, byte_size);
}

void append_shared_tensor(std::string& to, std::uint32_t number, DataType dtype, const Shape& shape,
                          std::size_t byte_size, const SharedPlace& place) {
  std::string region;
  pbf_writer writer(region);
  add_text(writer, 1, place.region);
  add_number(writer, 2, place.offset);
  add_number(writer, 3, byte_size);
  std::string tensor = header_of(dtype, shape);
  pbf_writer(tensor).add_message(kShared, region);
  pbf_writer(to).add_message(number, tensor);
}

void append_chunked_tensor(std::string& to, std::uint32_t number, DataType dtype,
                           const Shape& shape, std::size_t byte_size) {
  std::string content;
  pbf_writer writer(content);
  add_number(writer, 1, byte_size);
  std::string tensor = header_of(dtype, shape);
  pbf_writer(tensor).add_message(kChunked, content);
  pbf_writer(to).add_message(number, tensor);
}

void append_timings(std::string& to, std::uint32_t number, const Timings& timings) {
  std::string body;
  pbf_writer writer(body);
  add_number(writer, 1, timings.deserialize);
  add_number(writer, 2, timings.queue);
  add_number(writer, 3, timings.compute);
  add_number(writer, 4, timings.serialize);
  add_number(writer, 5, timings.batch_size);
  pbf_writer(to).add_message(number, body);
}

void fill_tail(Bytes& answer, std::size_t at, std::string tail, std::uint32_t padding) {
  append_padding(tail, padding, kTimingsRoom - tail.size());
  std::memcpy(answer.data() + at, tail.data(), tail.size());
}

std::string stream_head(std::uint64_t request_id) {
  std::string head;
  pbf_writer writer(head);
  add_number(writer, 1, request_id);
  return head;
}

Bytes stream_message(std::uint64_t request_id, std::uint32_t number, const std::string& body) {
  std::string message = stream_head(request_id);
  pbf_writer(message).add_message(number, body);
  return bytes_of(message);
}

std::string error_message(const Status& status) {
  std::string error;
  pbf_writer writer(error);
  if (status.code != Code::kOk) writer.add_int32(1, static_cast<std::int32_t>(status.code));
  add_text(writer, 2, as_utf8(status.message));
  add_number(writer, 3, static_cast<std::uint64_t>(status.retry_after.count()));
  return error;
}

}  // namespace attnserve::wire
