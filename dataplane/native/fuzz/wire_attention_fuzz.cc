// Whatever bytes come as a message of attnserve.v1: they are decoded or refused, and what is
// decoded lies within them.
#include <cstdint>
#include <cstdlib>

#include "wire/attention.h"

namespace {

using namespace attnserve;

void within(ByteSpan view, ByteSpan message) {
  if (view.empty()) return;
  if (view.data() < message.data() || view.data() + view.size() > message.data() + message.size()) {
    std::abort();
  }
}

void within(std::string_view view, ByteSpan message) {
  within(std::as_bytes(std::span(view)), message);
}

void within(const wire::AttendRequest& request, ByteSpan message) {
  within(request.model, message);
  within(request.version, message);
  within(request.variant, message);
  for (const auto& tensor : request.tensors) {
    if (!tensor) continue;
    within(tensor->data, message);
    within(tensor->region.name, message);
    within(tensor->stored, message);
  }
  if (request.output_region) within(request.output_region->name, message);
}

// Runs one decode function; it may refuse the message, in the one way that there is.
template <class Decode>
void decode(Decode function) {
  try {
    function();
  } catch (const RequestError& error) {
    if (error.status().code != Code::kInvalidArgument) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const ByteSpan message = std::as_bytes(std::span(data, size));
  decode([&] { within(wire::decode_attend(message, "Attend"), message); });
  decode([&] {
    const auto request = wire::decode_attend_stream(message);
    if (request.request) within(*request.request, message);
    if (request.chunk) within(request.chunk->data, message);
  });
  decode([&] {
    const auto request = wire::decode_put_tensor(message);
    if (request.header) within(request.header->data, message);
    if (request.chunk) within(request.chunk->data, message);
  });
  decode([&] { within(wire::decode_renew_tensor(message).handle, message); });
  decode([&] { within(wire::decode_drop_tensor(message), message); });
  decode([&] { within(wire::decode_register_shared_memory(message).key, message); });
  decode([&] { within(wire::decode_unregister_shared_memory(message), message); });
  return 0;
}
