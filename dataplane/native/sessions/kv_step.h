// A step of some sessions while it is under way, and one layer of it while it is computed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "sessions/kv_spec.h"

namespace attnserve::sessions {

class KvSession;
class KvSessions;

// What a session's cache is in one layer once the step's new keys are in it.
struct LayerSequence {
  std::int64_t length = 0;              // keys, the new ones included
  std::span<const std::int64_t> table;  // offset of each page in `cache`; -1: given back
};

// Shared by the stream that began it and by whoever computes layers of it. When the last of them
// lets go before all layers are computed, it is abandoned: its sessions hold what they held before.
// KvSessions outlives it. What can be read is constant from the start: any thread.
class KvStep {
 public:
  // By KvSessions alone. `queries_only`: nothing is added to the sessions.
  KvStep(KvSessions& store, SessionSpecPtr spec, std::size_t size, bool queries_only);
  ~KvStep();
  KvStep(const KvStep&) = delete;
  KvStep& operator=(const KvStep&) = delete;

  const SessionSpec& spec() const { return *spec_; }  // one object for equal ones
  std::size_t size() const { return sessions_.size(); }
  std::span<const std::int64_t> lengths() const { return lengths_; }  // [S], before the step
  std::span<const std::int64_t> starts() const { return starts_; }    // [S+1], of new tokens
  bool queries_only() const { return queries_only_; }
  // [S+1], of the new keys of a layer: `starts`, or of a cross layer where those of cross_tokens
  // begin; with queries alone there are none.
  std::span<const std::int64_t> key_starts(std::size_t layer) const {
    return queries_only_ || spec_->layers[layer].cross ? cross_starts_ : starts_;
  }
  // [S], once the step's are in it: of a layer, and of a cross layer.
  std::span<const std::int64_t> keys() const { return keys_; }
  std::span<const std::int64_t> cross_keys() const { return cross_keys_; }
  // [T], as the operator takes them, if any session has a tree; else none.
  std::span<const std::int64_t> parents() const { return parents_; }

 private:
  friend class KvSessions;
  friend class KvLayer;
  enum class Layer : std::uint8_t { kWaiting, kRunning, kDone };

  void add(const KvSession& session, const SessionStep& asked);
  void add_trees(std::span<const SessionStep> sessions);
  void end();      // under the lock, all layers being done
  void abandon();  // under the lock

  KvSessions* store_;
  SessionSpecPtr spec_;
  bool queries_only_;
  std::vector<std::shared_ptr<KvSession>> sessions_;
  std::vector<std::int64_t> lengths_, starts_, cross_starts_, keys_, cross_keys_, parents_;
  // Guarded by the lock of KvSessions:
  std::vector<std::vector<PageHash>> chains_;     // of pages that each session fills, if any
  std::vector<std::vector<std::int32_t>> trees_;  // of each session, if any has one
  std::vector<Layer> layers_;
  std::size_t layers_left_ = 0;
};

// One layer of a step, being computed: its pages are there, and belong to whoever holds this. What
// `sequences` shows is valid until `done` or destruction. Owned by one thread at a time.
class KvLayer {
 public:
  KvLayer(KvLayer&&) noexcept = default;
  KvLayer& operator=(KvLayer&&) = delete;
  ~KvLayer();  // not done: the layer can be begun again

  const KvStep& step() const { return *step_; }  // until done
  std::size_t layer() const { return layer_; }
  std::span<const LayerSequence> sequences() const { return sequences_; }  // [S]

  // The new keys and values are in the cache. True: this was the last layer, and the step has
  // ended. Once.
  bool done();

 private:
  friend class KvSessions;
  explicit KvLayer(std::size_t layer) : layer_(layer) {}

  std::shared_ptr<KvStep> step_;  // empty unless the layer is running
  std::size_t layer_;
  std::vector<LayerSequence> sequences_;
};

}  // namespace attnserve::sessions
