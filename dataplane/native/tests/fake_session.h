// A session that is there for what it takes and gives alone.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "engine/model.h"

namespace attnserve::engine {

class FakeSession final : public Session {
 public:
  FakeSession(const std::vector<std::string>& takes, const std::vector<std::string>& gives,
              bool any_heads = false)
      : any_heads_(any_heads) {
    for (const auto& name : takes) inputs_.push_back({name, DataType::kFp32, {-1}});
    for (const auto& name : gives) outputs_.push_back({name, DataType::kFp32, {-1}});
  }
  const std::vector<Port>& inputs() const override { return inputs_; }
  const std::vector<Port>& outputs() const override { return outputs_; }
  bool any_heads() const override { return any_heads_; }
  void run(std::span<const Feed>, std::span<Fetch>, Stop*) override {
    throw std::logic_error("a fake session was run");
  }
  std::unique_ptr<Stop> make_stop() override { return nullptr; }

 private:
  std::vector<Port> inputs_, outputs_;
  bool any_heads_;
};

inline const Variant& add_variant(Model& model, const std::string& name,
                                  std::unique_ptr<Session> session) {
  auto variant = std::make_unique<Variant>();
  variant->facts.name = name;
  variant->session = std::move(session);
  return *model.variants.emplace_back(std::move(variant));
}

}  // namespace attnserve::engine
