// Requests of attnserve.v1. A message that comes twice where one is expected is merged with the
// first, of a oneof the last member holds: as protobuf reads them.
#include <bit>

#include "wire/attention.h"
#include "wire/fields.h"
#include "wire/tensor_fields.h"

namespace attnserve::wire {

namespace {

constexpr std::uint32_t kRequestUncounted = numbers({15});  // AttendRequest.padding
constexpr std::uint32_t kChunkUncounted = numbers({4});     // TensorChunk.padding

void merge(FieldReader reader, ReturnOptions& returns) {
  while (reader.next()) {
    switch (reader.key()) {
      case varint_field(1):
        returns.no_output = reader.flag();
        break;
      case varint_field(2):
        returns.weights = reader.flag();
        break;
      case varint_field(3):
        returns.entropy = reader.flag();
        break;
      case varint_field(4):
        returns.top_k = reader.number32();
        break;
      case varint_field(5):
        returns.mass_per_key = reader.flag();
        break;
      case varint_field(6):
        returns.mass_by_distance = reader.number32();
        break;
      case varint_field(7):
        returns.log_sum_exp = reader.flag();
        break;
    }
  }
}

void merge(FieldReader reader, AttendRequest& request) {
  while (reader.next()) {
    switch (reader.key()) {
      case bytes_field(1):
        request.model = reader.text();
        break;
      case bytes_field(2):
        request.version = reader.text();
        break;
      case bytes_field(3):
        request.variant = reader.text();
        break;
      case bytes_field(4):
      case bytes_field(5):
      case bytes_field(6):
      case bytes_field(7):
      case bytes_field(8):
      case bytes_field(9):
      case bytes_field(10):
      case bytes_field(17):
      case bytes_field(18):
      case bytes_field(19):
      case bytes_field(20): {
        const auto input = static_cast<std::size_t>(*input_of_field(reader.key() >> 3));
        merge(reader.message(), present(request.tensors[input]));
        break;
      }
      case fixed32_field(11):
        request.scale = std::bit_cast<float>(reader.number32());
        break;
      case fixed32_field(12):
        request.softcap = std::bit_cast<float>(reader.number32());
        break;
      case bytes_field(13):
        merge(reader.message(), request.returns);
        break;
      case bytes_field(14):
        merge(reader.message(), present(request.output_region));
        break;
      case varint_field(16):
        request.priority = reader.number32();
        break;
    }
  }
}

void merge(FieldReader reader, TensorChunk& chunk) {
  while (reader.next()) {
    switch (reader.key()) {
      case varint_field(1):
        chunk.tensor = reader.number32();
        break;
      case varint_field(2):
        chunk.offset = reader.number();
        break;
      case bytes_field(3):
        chunk.data = reader.bytes();
        break;
    }
  }
}

void merge_header(FieldReader reader, PutTensorRequest& request) {
  TensorMessage& tensor = present(request.header);
  while (reader.next()) {
    switch (reader.key()) {
      case bytes_field(1):
        merge(reader.message(), tensor);
        break;
      case varint_field(2):
        request.lease = reader.number();
        break;
    }
  }
}

// A message whose one field is a text of number 1.
std::string_view decode_text(ByteSpan message, std::string_view method) {
  Decoding decoding(method);
  std::string_view text;
  for (FieldReader reader(message, decoding); reader.next();) {
    if (reader.key() == bytes_field(1)) text = reader.text();
  }
  return text;
}

// A message of a text of number 1 and a number of number 2.
std::pair<std::string_view, std::uint64_t> decode_text_and_number(ByteSpan message,
                                                                  std::string_view method) {
  Decoding decoding(method);
  std::pair<std::string_view, std::uint64_t> values;
  for (FieldReader reader(message, decoding); reader.next();) {
    if (reader.key() == bytes_field(1)) values.first = reader.text();
    if (reader.key() == varint_field(2)) values.second = reader.number();
  }
  return values;
}

}  // namespace

AttendRequest decode_attend(ByteSpan message, std::string_view method) {
  Decoding decoding(method);
  AttendRequest request;
  merge(FieldReader(message, decoding, kRequestUncounted), request);
  return request;
}

AttendStreamRequest decode_attend_stream(ByteSpan message) {
  Decoding decoding("AttendStream");
  AttendStreamRequest whole;
  for (FieldReader reader(message, decoding); reader.next();) {
    switch (reader.key()) {
      case varint_field(1):
        whole.request_id = reader.number();
        break;
      case bytes_field(2):
        whole.chunk.reset();
        merge(reader.message(kRequestUncounted), present(whole.request));
        break;
      case bytes_field(3):
        whole.request.reset();
        merge(reader.message(kChunkUncounted), present(whole.chunk));
        break;
      case varint_field(4):
        whole.timeout = reader.number();
        break;
    }
  }
  return whole;
}

PutTensorRequest decode_put_tensor(ByteSpan message) {
  Decoding decoding("PutTensor");
  PutTensorRequest request;
  for (FieldReader reader(message, decoding); reader.next();) {
    switch (reader.key()) {
      case bytes_field(1):
        request.chunk.reset();
        merge_header(reader.message(), request);
        break;
      case bytes_field(2):
        request.header.reset();
        request.lease = 0;
        merge(reader.message(kChunkUncounted), present(request.chunk));
        break;
    }
  }
  return request;
}

RenewTensorRequest decode_renew_tensor(ByteSpan message) {
  const auto [handle, lease] = decode_text_and_number(message, "RenewTensor");
  return {handle, lease};
}

std::string_view decode_drop_tensor(ByteSpan message) { return decode_text(message, "DropTensor"); }

RegisterSharedMemoryRequest decode_register_shared_memory(ByteSpan message) {
  const auto [key, byte_size] = decode_text_and_number(message, "RegisterSharedMemory");
  return {key, byte_size};
}

std::string_view decode_unregister_shared_memory(ByteSpan message) {
  return decode_text(message, "UnregisterSharedMemory");
}

}  // namespace attnserve::wire
