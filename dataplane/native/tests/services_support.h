// A call that notes what it is asked for, and a core for it.
#pragma once

#include <doctest/doctest.h>

#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "grpc/call.h"
#include "services/core.h"
#include "services/exchange.h"

namespace attnserve::services {

class NotedCall final : public grpc::Call {
 public:
  explicit NotedCall(std::string path = "/a/Method", std::string authorization = "",
                     const TraceContext& trace = {}) {
    info_.trace = trace;
    info_.path = std::move(path);
    info_.authorization = std::move(authorization);
    info_.peer = "ipv4:127.0.0.1:4242";
    info_.connection = 7;
    info_.arrived = Clock::now();
  }

  const grpc::CallInfo& info() const override { return info_; }
  void identify(std::shared_ptr<identity::Caller> caller, const std::string& name,
                std::shared_ptr<const identity::Credential> credential) override {
    info_.caller = std::move(caller);
    info_.credential = std::move(credential);
    info_.authorization.clear();
    if (!name.empty()) info_.peer += "@" + name;
  }
  void record(std::shared_ptr<tracing::Recording> recording) override {
    info_.recording = std::move(recording);
  }
  void send(OutMessage message) override {
    const std::lock_guard lock(mutex_);
    if (finished_) return;
    std::string whole;
    for (const Piece& piece : message.pieces) {
      whole.append(reinterpret_cast<const char*>(piece.bytes.data()), piece.bytes.size());
    }
    sent_.push_back(std::move(whole));
  }
  void finish(Status status) override {
    const std::lock_guard lock(mutex_);
    if (!finished_) finished_ = std::move(status);
  }
  void pause() override {
    const std::lock_guard lock(mutex_);
    ++pauses_;
  }
  void resume() override {
    const std::lock_guard lock(mutex_);
    --pauses_;
  }
  std::size_t unsent() const override { return 0; }
  bool ended() const override { return finished().has_value(); }

  void add_metadata(std::string name, std::string value) {
    info_.metadata.emplace_back(std::move(name), std::move(value));
  }
  std::vector<std::string> sent() const {
    const std::lock_guard lock(mutex_);
    return sent_;
  }
  std::optional<Status> finished() const {
    const std::lock_guard lock(mutex_);
    return finished_;
  }
  int pauses() const {
    const std::lock_guard lock(mutex_);
    return pauses_;
  }

 private:
  grpc::CallInfo info_;
  mutable std::mutex mutex_;  // guards what follows
  std::vector<std::string> sent_;
  std::optional<Status> finished_;
  int pauses_ = 0;
};

inline Bytes bytes_of(std::string_view text) {
  Bytes bytes = Bytes::allocate(text.size());
  std::copy_n(reinterpret_cast<const std::byte*>(text.data()), text.size(), bytes.data());
  return bytes;
}

inline std::string text_of(const Bytes& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

inline Delivery delivered(std::string_view text) {
  return delivery_of(OutMessage::of(bytes_of(text)));
}

inline std::uint64_t counted(const Core& core, const std::string& method, Code code) {
  const auto requests = core.statistics.requests();
  const auto found = requests.find({method, code});
  return found == requests.end() ? 0 : found->second;
}

}  // namespace attnserve::services
