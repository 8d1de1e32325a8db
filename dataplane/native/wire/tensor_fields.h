// What several messages of attnserve.v1 hold: tensors, shared memory and timings, read and written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <protozero/pbf_writer.hpp>
#include <string>

#include "base/tensor.h"
#include "wire/attention.h"
#include "wire/fields.h"
#include "wire/layout.h"

namespace attnserve::wire {

// Each adds what a message says to what an earlier one said, as protobuf merges them.
void merge(FieldReader reader, RegionMessage& region);
void merge(FieldReader reader, TensorMessage& tensor);

// A value that is there from now on, as it was if it was there before.
template <class T>
T& present(std::optional<T>& value) {
  return value ? *value : value.emplace();
}

// Proto3: a number that is 0 is left out.
inline void add_number(protozero::pbf_writer& writer, std::uint32_t number, std::uint64_t value) {
  if (value != 0) writer.add_uint64(number, value);
}

// Tensor messages as field `number` of what `to` holds. One with room for its elements:
void add_tensor(Frame& to, std::uint32_t number, DataType dtype, const Shape& shape,
                std::size_t byte_size);
// one whose elements lie in shared memory:
void append_shared_tensor(std::string& to, std::uint32_t number, DataType dtype, const Shape& shape,
                          std::size_t byte_size, const SharedPlace& place);
// one whose chunks follow.
void append_chunked_tensor(std::string& to, std::uint32_t number, DataType dtype,
                           const Shape& shape, std::size_t byte_size);

// Room for timings in an answer that is laid out before they are known: five numbers of at most
// eleven bytes, what says how long they are, and 7 bytes for padding and the like.
constexpr std::size_t kTimingsRoom = 64;
void append_timings(std::string& to, std::uint32_t number, const Timings& timings);

// The end of such an answer, once all is known: `tail` in the room at `at`, and padding.
void fill_tail(Bytes& answer, std::size_t at, std::string tail, std::uint32_t padding);

// Answers of streams: a request_id (field 1), and a field with what is answered.
std::string stream_head(std::uint64_t request_id);
Bytes stream_message(std::uint64_t request_id, std::uint32_t number, const std::string& body);

// An Error; whatever of its message is not UTF-8 is replaced.
std::string error_message(const Status& status);

}  // namespace attnserve::wire
