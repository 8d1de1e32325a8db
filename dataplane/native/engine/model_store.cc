// Which models are loaded, and the words for those that are not.
#include <algorithm>
#include <charconv>
#include <utility>

#include "base/status.h"
#include "base/text.h"
#include "engine/model.h"

namespace attnserve::engine {

// What a store holds at one moment. Never changed: put() makes another.
struct ModelStore::Loaded {
  std::map<std::string, std::map<std::int64_t, ModelPtr>, std::less<>> models;  // none is empty
  std::map<std::string, std::string, std::less<>> unloaded;  // and why; empty: it was asked for
};

namespace {

// Of a name's loaded versions.
template <class Map, class Word>
std::string listed(const Map& map, Word word) {
  std::string whole;
  for (const auto& [key, value] : map) whole += text(whole.empty() ? "" : ", ", word(key));
  return whole;
}

// The number that a version is, at most as many digits as one may have; 0: it is none.
std::uint64_t number_of(std::string_view version) {
  constexpr std::size_t kMostDigits = 19;
  const bool plain = version.size() <= kMostDigits && std::ranges::all_of(version, [](char digit) {
                       return digit >= '0' && digit <= '9';
                     });
  std::uint64_t number = 0;
  if (plain) std::from_chars(version.data(), version.data() + version.size(), number);
  return number;
}

}  // namespace

std::shared_ptr<const ModelStore::Loaded> ModelStore::now() const {
  const std::scoped_lock lock(mutex_);
  return now_;
}

ModelPtr ModelStore::get(std::string_view name, std::string_view version) const {
  static const Loaded nothing;
  const std::shared_ptr<const Loaded> held = now();
  const Loaded& loaded = held ? *held : nothing;
  const auto found = loaded.models.find(name);
  if (found == loaded.models.end()) {
    if (const auto why = loaded.unloaded.find(name); why != loaded.unloaded.end()) {
      if (!why->second.empty()) {  // it will not be there for waiting
        throw RequestError(Code::kFailedPrecondition,
                           text("model: ", name, " is not served: ", why->second));
      }
      throw RequestError(Code::kUnavailable,
                         text("model: ", name, " is unloaded; load it, or call another"));
    }
    const std::string known = listed(loaded.models, [](const std::string& key) { return key; });
    throw RequestError(Code::kNotFound, text("model: given ", quoted(name),
                                             "; models here: ", known.empty() ? "none" : known));
  }
  const auto& versions = found->second;
  if (version.empty()) return versions.rbegin()->second;
  const std::uint64_t number = number_of(version);
  const auto model = std::ranges::find_if(
      versions, [&](auto& each) { return std::cmp_equal(each.first, number); });
  if (model != versions.end()) return model->second;
  const std::string known = listed(versions, [](std::int64_t key) { return text(key); });
  constexpr std::size_t kShown = 80;
  throw RequestError(Code::kNotFound,
                     text("version: given ", quoted(first_characters(version, kShown)),
                          "; versions of ", name, ": ", known));
}

void ModelStore::put(const std::string& name, std::vector<ModelPtr> models, std::string reason) {
  std::shared_ptr<const Loaded> replaced;  // destroys sessions, perhaps: not under the lock
  const std::scoped_lock lock(mutex_);
  auto next = now_ ? std::make_shared<Loaded>(*now_) : std::make_shared<Loaded>();
  next->models.erase(name);
  if (models.empty()) {
    next->unloaded[name] = std::move(reason);
  } else {
    next->unloaded.erase(name);
    for (ModelPtr& model : models) {
      const std::int64_t version = model->facts.version;
      next->models[name][version] = std::move(model);
    }
  }
  replaced = std::exchange(now_, std::move(next));
}

}  // namespace attnserve::engine
