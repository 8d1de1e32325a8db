// Whatever bytes come as a request of Decode, or of MoveSession: they are decoded or refused, and
// what is decoded lies within them.
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <variant>

#include "wire/kv_sessions.h"

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

void within(const std::optional<wire::TensorMessage>& tensor, ByteSpan message) {
  if (!tensor) return;
  within(tensor->data, message);
  within(tensor->region.name, message);
  within(tensor->stored, message);
}

// Where each action's views are.
struct Views {
  ByteSpan message;

  void operator()(const std::monostate&) const {}
  void operator()(const wire::AbandonStep&) const {}
  void operator()(const wire::OpenSessions& open) const {
    within(open.model, message);
    within(open.version, message);
    for (const auto& session : open.sessions) within(session.prefix_hashes, message);
    for (const auto& layer : open.layer_models) {
      within(layer.model, message);
      within(layer.version, message);
    }
  }
  void operator()(const wire::BeginStep& step) const {
    for (const auto& session : step.sessions) {
      within(session.session_id, message);
      within(session.prefix_hashes, message);
    }
  }
  void operator()(const wire::AttendLayer& layer) const {
    within(layer.query, message);
    within(layer.key, message);
    within(layer.value, message);
    within(layer.hidden_states, message);
    if (layer.begin) (*this)(*layer.begin);
    if (layer.output_region) within(layer.output_region->name, message);
  }
  void operator()(const wire::ImportSession& session) const { within(session.chunk.data, message); }
  void operator()(const auto& action) const { within(action.session_id, message); }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const ByteSpan message = std::as_bytes(std::span(data, size));
  try {
    std::visit(Views{message}, wire::decode_decode(message).action);
  } catch (const RequestError& error) {
    if (error.status().code != Code::kInvalidArgument) std::abort();
  }
  try {
    const wire::MoveSessionRequest moving = wire::decode_move_session(message);
    within(moving.chunk.data, message);
    if (moving.session) {
      within(moving.session->caller, message);
      within(moving.session->prefix_hashes, message);
    }
  } catch (const RequestError& error) {
    if (error.status().code != Code::kInvalidArgument) std::abort();
  }
  return 0;
}
