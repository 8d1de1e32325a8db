// One layer of a step of KV sessions, from its request to its answer.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/paged.h"
#include "requests/kv_sessions.h"
#include "services/core.h"
#include "services/stream_state.h"
#include "sessions/kv_step.h"

namespace attnserve::services {

// A step that is open on a stream. Constant but for what is atomic, and `step` when it is given up.
struct OpenStep {
  requests::KvModels models;
  std::shared_ptr<sessions::KvStep> step;  // until `ended`
  std::vector<std::string> session_ids;    // in the order of their names
  std::int64_t tokens = 0, cross_tokens = 0;
  std::uint32_t priority = requests::kNormal;
  // A layer of it waits to run or runs: one at a time, so that answers come in order.
  std::atomic<bool> computing{false};
  std::atomic<bool> ended{false};  // all layers are computed, or it was given up

  requests::StepShape shape() const {
    return {models.facts(),      step->spec().layers,        tokens,
            cross_tokens,        step->spec().layout.latent, step->starts(),
            step->keys(),        step->cross_keys(),         models.give_weights(),
            step->queries_only()};
  }
  // Its sessions hold what they held before it. By whoever computes a layer of it, or while nobody
  // does.
  void give_up() {
    ended = true;
    step.reset();
  }
};

// An AttendLayer, of which all parts are there or one is yet to come.
struct LayerRequest {
  std::uint64_t request_id = 0;
  std::shared_ptr<OpenStep> step;
  std::uint64_t step_id = 0;
  bool begins = false;  // the step: without its answer that has not begun
  std::shared_ptr<schedule::RequestContext> request;
  Admitted admitted;
  TimePoint arrived{};               // its first part
  requests::LayerPart part;          // of all that is there
  std::array<ByteSpan, 4> elements;  // of query, key, value and hidden states, as far as sent
  std::vector<std::shared_ptr<const Bytes>> messages;  // that hold them

  // Throws RequestError, and is then of no more use.
  void add(const wire::AttendLayer& message, const requests::Limits& limits,
           std::shared_ptr<const Bytes> bytes);
  bool complete() const;
};

// Submits a layer that is complete. Throws RequestError: what it needs is not there.
// A delivery of Decode: an error is an answer of its own.
Delivery decode_delivery(std::uint64_t request_id, Delivery delivery);

void begin_layer(Core& core, const std::shared_ptr<StreamState>& stream, LayerRequest layer);

}  // namespace attnserve::services
