// Random operations on KV sessions beside a plain model: what each session should hold is a list of
// tokens, and each page is checked against it.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <map>
#include <random>
#include <thread>

#include "kv_support.h"

using namespace attnserve;
using namespace attnserve::sessions;
using namespace attnserve::sessions::test;
using namespace std::chrono_literals;

namespace {

constexpr std::uint64_t kPromisedStep = 40;

struct Model {
  std::string id;
  std::size_t spec = 0;
  std::vector<std::uint64_t> tokens, cross;
  std::uint64_t max_tokens = 0, reserved_tokens = 0, cross_tokens = 0;
  std::size_t hashed = 0;    // pages at its beginning with hashes
  std::size_t document = 0;  // whose tokens it takes, as long as it has no others
  bool off_document = false;
  std::size_t least_length = 0;     // that truncate must be able to go back to, where windows are
  std::vector<std::uint64_t> tree;  // tokens that wait for commit
  std::vector<std::int32_t> parents;
};

struct OpenStep {
  std::shared_ptr<KvStep> step;
  std::vector<std::size_t> sessions;  // indices
  std::vector<std::vector<std::uint64_t>> tokens, cross;
  std::vector<std::vector<std::int32_t>> parents;
  std::vector<std::vector<PageHash>> hashes;
  std::vector<std::size_t> left;  // layers, in the order in which they are computed
};

// One caller. Several may use one store, each with its own sessions.
class Machine {
 public:
  Machine(KvSessions& store, std::vector<SessionSpec> specs, std::string owner, unsigned seed)
      : store_(store), specs_(std::move(specs)), owner_(std::move(owner)), random_(seed) {}

  std::size_t mismatches() const { return mismatches_; }
  const std::map<std::string, std::size_t>& done() const { return done_; }

  void act() {
    static constexpr void (Machine::* kActions[])() = {
        &Machine::open,   &Machine::begin,    &Machine::begin,  &Machine::begin,  &Machine::layer,
        &Machine::layer,  &Machine::layer,    &Machine::layer,  &Machine::layer,  &Machine::layer,
        &Machine::layer,  &Machine::layer,    &Machine::finish, &Machine::finish, &Machine::commit,
        &Machine::commit, &Machine::truncate, &Machine::fork,   &Machine::move,   &Machine::close,
        &Machine::expire, &Machine::abandon,  &Machine::wrong};
    (this->*kActions[below(std::size(kActions))])();
  }

  void close_all() {
    steps_.clear();
    while (!sessions_.empty()) {
      store_.close(sessions_.begin()->second.id, owner_);
      sessions_.erase(sessions_.begin());
    }
  }

 private:
  std::size_t below(std::size_t most) { return random_() % most; }
  std::uint64_t fresh_token() { return random_() | std::uint64_t{1} << 40; }

  void expect(bool holds, const char* what) {
    if (holds) return;
    ++mismatches_;
    MESSAGE(std::string(what));
  }

  // Runs an action that may find the store full. False: it did.
  template <class Action>
  bool unless_full(const char* name, bool must, const Action& action) {
    const Status status = refusal(action);
    if (!status.ok()) {
      expect(status.code == Code::kResourceExhausted && !must, status.message.c_str());
      ++done_[std::string(name) + " refused"];
      return false;
    }
    ++done_[name];
    return true;
  }

  Model* any(bool tree = false) {
    std::vector<Model*> idle;
    for (auto& [number, model] : sessions_) {
      if (!in_step_.contains(number) && model.parents.empty() != tree) idle.push_back(&model);
    }
    return idle.empty() ? nullptr : idle[below(idle.size())];
  }

  const SessionSpec& spec(const Model& model) const { return specs_[model.spec]; }
  bool has_window(const Model& model) const {
    return std::ranges::any_of(spec(model).layers,
                               [](const LayerSpec& layer) { return layer.window >= 0; });
  }
  bool has_cross(const Model& model) const {
    return std::ranges::any_of(spec(model).layers,
                               [](const LayerSpec& layer) { return layer.cross; });
  }

  // The next token: of the document, as long as all tokens before it are.
  std::uint64_t next_token(Model& model, std::size_t at) {
    if (at >= 100 || below(1000) == 0) model.off_document = true;
    return model.off_document ? fresh_token() : mixed(model.document) + at;
  }

  void open() {
    if (sessions_.size() >= 14) return;
    Model model;
    model.spec = below(specs_.size());
    model.max_tokens = 1 + below(400);
    model.reserved_tokens = 1 + below(model.max_tokens);
    model.document = below(2);
    if (has_cross(model)) model.cross_tokens = 1 + below(50);
    NewSession asked{model.max_tokens, model.reserved_tokens, model.cross_tokens, {}};
    std::vector<std::uint64_t> document;
    if (!has_cross(model) && below(3) > 0) {
      for (std::size_t at = 0, end = 16 * below(7); at < end; ++at) {
        document.push_back(mixed(model.document) + at);
      }
      asked.prefix_hashes = hashes_of(document, 16);
    }
    std::vector<SessionState> opened;
    if (!unless_full("open", false, [&] {
          opened = store_.open(spec(model), std::span(&asked, 1), 1h, owner_);
        })) {
      return;
    }
    const SessionState& state = opened.front();
    expect(state.length % 16 == 0 && state.length <= document.size() &&
               state.length <= model.max_tokens,
           "the length of a found prefix");
    if (state.length > 0) ++done_["prefix found"];
    model.id = state.id;
    document.resize(state.length);
    model.tokens = document;
    model.hashed = state.length / 16;
    model.least_length = state.length;
    sessions_.emplace(++numbers_, model);
  }

  void begin() {
    if (steps_.size() >= 4) return;
    std::vector<std::size_t> chosen;
    const std::size_t wanted = 1 + below(4);
    std::size_t of_spec = specs_.size();
    for (auto& [number, model] : sessions_) {
      if (chosen.size() == wanted || in_step_.contains(number) || !model.parents.empty()) continue;
      if (model.tokens.size() == model.max_tokens || below(2) == 0) continue;
      if (of_spec == specs_.size()) of_spec = model.spec;
      if (model.spec == of_spec) chosen.push_back(number);
    }
    if (chosen.empty()) return;
    std::shuffle(chosen.begin(), chosen.end(), random_);

    OpenStep open;
    open.sessions = chosen;
    std::vector<SessionStep> asked;
    bool must = true;  // not be refused
    const bool trees = below(4) == 0;
    for (const std::size_t number : chosen) {
      Model& model = sessions_.at(number);
      const std::size_t room = model.max_tokens - model.tokens.size();
      const std::size_t count = 1 + below(std::min<std::size_t>(room, below(3) == 0 ? 90 : 7));
      must = must && model.tokens.size() + count <= model.reserved_tokens &&
             (count <= kPromisedStep || !has_window(model));
      std::vector<std::uint64_t> tokens;
      std::vector<std::int32_t> parents;
      const bool tree = trees && below(4) > 0;
      for (std::size_t at = 0; at < count; ++at) {
        tokens.push_back(tree ? fresh_token() : next_token(model, model.tokens.size() + at));
        if (tree) parents.push_back(static_cast<std::int32_t>(below(at + 1)) - 1);
      }
      std::vector<std::uint64_t> cross;
      if (has_cross(model) && model.cross.empty()) {
        for (std::size_t at = 1 + below(model.cross_tokens); at > 0; --at) {
          cross.push_back(fresh_token());
        }
      }
      std::vector<PageHash> hashes;
      if (!tree && !has_cross(model) && below(4) > 0) {
        std::vector<std::uint64_t> all = model.tokens;
        all.insert(all.end(), tokens.begin(), tokens.end());
        hashes = hashes_of(all, 16, model.hashed);
      }
      open.tokens.push_back(tokens);
      open.cross.push_back(cross);
      open.parents.push_back(parents);
      open.hashes.push_back(hashes);
    }
    for (std::size_t index = 0; index < chosen.size(); ++index) {
      asked.push_back({sessions_.at(chosen[index]).id, open.tokens[index].size(),
                       open.parents[index], open.hashes[index], open.cross[index].size()});
    }
    if (!unless_full("begin", must, [&] { open.step = store_.begin_step(asked, owner_); })) return;
    for (std::size_t index = 0; index < chosen.size(); ++index) {
      expect(open.step->lengths()[index] ==
                 static_cast<std::int64_t>(sessions_.at(chosen[index]).tokens.size()),
             "the length before a step");
      in_step_.insert({chosen[index], true});
    }
    for (std::size_t layer = 0; layer < open.step->spec().layers.size(); ++layer) {
      open.left.push_back(layer);
    }
    if (below(2) == 0) std::shuffle(open.left.begin(), open.left.end(), random_);
    steps_.push_back(std::move(open));
  }

  void layer() {
    if (!steps_.empty()) compute(below(steps_.size()));
  }

  void finish() {
    if (steps_.empty()) return;
    const std::size_t which = below(steps_.size());
    const std::size_t before = steps_.size();
    while (steps_.size() == before) compute(which);
  }

  // One layer: the new tokens are written, as the operator would, and all that can be seen checked.
  void compute(std::size_t which) {
    OpenStep& open = steps_[which];
    const std::size_t layer = open.left.back();
    const LayerSpec& of = open.step->spec().layers[layer];
    const PageLayout& layout = open.step->spec().layout;
    KvLayer running = store_.begin_layer(open.step, layer);
    std::byte* cache = store_.cache().data();
    const bool fails = below(10) == 0;  // and is computed again later
    for (std::size_t index = 0; index < open.sessions.size(); ++index) {
      const Model& model = sessions_.at(open.sessions[index]);
      const LayerSequence& sequence = running.sequences()[index];
      const auto& before = of.cross ? model.cross : model.tokens;
      const auto& added = of.cross ? open.cross[index] : open.tokens[index];
      expect(sequence.length == static_cast<std::int64_t>(before.size() + added.size()),
             "the keys of a layer");
      for (std::size_t at = 0; at < added.size(); ++at) {
        write_token(layout, cache, sequence.table, before.size() + at, layer, added[at]);
      }
      std::int64_t first = 0;  // key that the step's first query sees
      if (of.window >= 0) first = static_cast<std::int64_t>(before.size()) - of.window;
      for (std::size_t at = 0; at < before.size() + added.size(); ++at) {
        const auto key = static_cast<std::int64_t>(at);
        if (key < first && key >= of.kept_first) continue;
        const std::uint64_t token = at < before.size() ? before[at] : added[at - before.size()];
        expect(holds_token(layout, cache, sequence.table, at, layer, token), "a key of a layer");
      }
    }
    if (fails) return;
    open.left.pop_back();
    const bool ended = running.done();
    expect(ended == open.left.empty(), "the end of a step");
    ++done_["layer"];
    if (!ended) return;
    for (std::size_t index = 0; index < open.sessions.size(); ++index) {
      Model& model = sessions_.at(open.sessions[index]);
      if (!open.cross[index].empty()) model.cross = open.cross[index];
      if (!open.parents[index].empty()) {
        model.tree = open.tokens[index];
        model.parents = open.parents[index];
      } else {
        model.tokens.insert(model.tokens.end(), open.tokens[index].begin(),
                            open.tokens[index].end());
        if (!open.hashes[index].empty()) model.hashed = model.tokens.size() / 16;
        gone_on(model);
      }
      in_step_.erase(open.sessions[index]);
    }
    ++done_["step"];
    steps_.erase(steps_.begin() + static_cast<std::ptrdiff_t>(which));
  }

  // A window may have given back what is more than kTruncatable behind.
  void gone_on(Model& model) const {
    if (model.tokens.size() > kTruncatable) {
      model.least_length = std::max(model.least_length, model.tokens.size() - kTruncatable);
    }
  }

  void commit() {
    Model* model = any(true);
    if (!model) return;
    std::vector<std::uint32_t> accepted;
    std::int32_t parent = -1;
    for (std::size_t token = 0; token < model->tree.size(); ++token) {
      if (model->parents[token] != parent || below(3) == 0) continue;
      accepted.push_back(static_cast<std::uint32_t>(token));
      parent = static_cast<std::int32_t>(token);
    }
    for (const std::uint32_t token : accepted) model->tokens.push_back(model->tree[token]);
    if (!accepted.empty()) model->off_document = true;
    model->tree.clear();
    model->parents.clear();
    const SessionState state = store_.commit(model->id, accepted, owner_);
    expect(state.length == model->tokens.size(), "the length after a commit");
    gone_on(*model);
    ++done_["commit"];
  }

  void truncate() {
    Model* model = any();
    if (!model) return;
    const std::size_t length =
        below(3) == 0
            ? below(model->tokens.size() + 1)
            : model->tokens.size() - std::min<std::size_t>(model->tokens.size(), below(20));
    const Status status = refusal([&] { store_.truncate(model->id, length, owner_); });
    if (status.code == Code::kFailedPrecondition) {
      expect(has_window(*model) && length < model->least_length, "a truncation that was refused");
      ++done_["truncate too far"];
      return;
    }
    // Full only where what it goes back into is shared.
    expect(status.ok() || status.code == Code::kResourceExhausted, status.message.c_str());
    ++done_[status.ok() ? "truncate" : "truncate refused"];
    if (!status.ok()) return;
    model->tokens.resize(length);
    model->hashed = std::min(model->hashed, length / 16);
    if (length > 0) model->off_document = true;
  }

  void fork() {
    if (sessions_.size() >= 14) return;
    const Model* other = any();
    if (!other) return;
    Model model = *other;
    const std::size_t length = below(2) == 0 ? model.tokens.size() : below(model.tokens.size() + 1);
    model.max_tokens = std::max<std::size_t>(1, length) + below(200);
    model.reserved_tokens = 1 + below(model.max_tokens);
    Status status;
    if (!unless_full("fork", false, [&] {
          status = refusal([&] {
            model.id =
                store_
                    .fork(other->id, length, {model.max_tokens, model.reserved_tokens}, 1h, owner_)
                    .id;
          });
          if (status.code == Code::kResourceExhausted) throw RequestError(status);
        })) {
      return;
    }
    if (!status.ok()) {
      expect(status.code == Code::kFailedPrecondition && has_window(model) &&
                 length < model.least_length,
             status.message.c_str());
      return;
    }
    model.tokens.resize(length);
    model.hashed = std::min(model.hashed, length / 16);
    model.off_document = true;
    gone_on(model);
    sessions_.emplace(++numbers_, model);
  }

  // Export and import: the copy takes the place of the session.
  void move() {
    Model* model = any();
    if (!model) return;
    unless_full("move", false, [&] {
      KvExport from = store_.export_session(model->id, owner_);
      const Bytes first = from.next(1 << 20);
      KvImport to = store_.import_session(read_exported(first.span()),
                                          {model->max_tokens, model->reserved_tokens}, 1h, owner_);
      to.add(first.span());
      while (!from.ended()) to.add(from.next(100 + below(5000)).span());
      const SessionState state = to.finish();
      expect(state.length == model->tokens.size(), "the length of an imported session");
      store_.close(model->id, owner_);
      model->id = state.id;
      model->hashed = 0;
    });
  }

  void forget(const std::string& id) {
    std::erase_if(sessions_, [&](const auto& entry) { return entry.second.id == id; });
  }

  void close() {
    if (sessions_.size() < 6) return;
    const Model* model = any();
    if (!model) return;
    const std::string id = model->id;
    store_.close(id, owner_);
    expect(refusal([&] { store_.close(id, owner_); }).code == Code::kNotFound, "closed twice");
    forget(id);
    ++done_["close"];
  }

  void expire() {
    if (sessions_.size() < 6 || below(3) > 0) return;
    const Model* model = any(below(2) == 0);
    if (!model) return;
    const std::string id = model->id;
    store_.renew(id, 1us, owner_);
    std::this_thread::sleep_for(2us);
    expect(refusal([&] { store_.renew(id, 1h, owner_); }).code == Code::kNotFound, "expired");
    forget(id);
    ++done_["expire"];
  }

  // The stream dies: the step goes; or a session of a step is closed from elsewhere.
  void abandon() {
    if (steps_.empty() || below(2) == 0) return;
    const std::size_t which = below(steps_.size());
    OpenStep open = std::move(steps_[which]);
    steps_.erase(steps_.begin() + static_cast<std::ptrdiff_t>(which));
    for (const std::size_t number : open.sessions) in_step_.erase(number);
    if (below(4) == 0) {
      const std::string id = sessions_.at(open.sessions.front()).id;
      store_.close(id, owner_);
      const Status status =
          refusal([&] { store_.begin_layer(open.step, open.left.back()).done(); });
      expect(status.code == Code::kNotFound, "a layer of a session that was closed");
      forget(id);
      ++done_["close in a step"];
    }
    ++done_["abandon"];
  }

  // What is wrong is refused, and changes nothing.
  void wrong() {
    const Model* model = any();
    if (!model) return;
    const auto code = [](const auto& action) { return refusal(action).code; };
    expect(code([&] { store_.truncate(model->id, model->tokens.size() + 1, owner_); }) ==
               Code::kInvalidArgument,
           "truncate to more");
    expect(code([&] { store_.commit(model->id, {}, owner_); }) == Code::kFailedPrecondition,
           "commit without a tree");
    expect(code([&] { store_.renew(model->id, 1h, owner_ + "x"); }) == Code::kNotFound,
           "another owner");
    expect(code([&] {
             begin_one(store_, model->id, model->max_tokens - model->tokens.size() + 1, owner_);
           }) == Code::kResourceExhausted,
           "a step beyond max_tokens");
    for (const OpenStep& open : steps_) {
      const std::string& id = sessions_.at(open.sessions.front()).id;
      expect(code([&] { begin_one(store_, id, 1, owner_); }) == Code::kFailedPrecondition,
             "two steps");
      expect(code([&] { store_.truncate(id, 0, owner_); }) == Code::kFailedPrecondition,
             "truncate in a step");
    }
    ++done_["wrong"];
  }

  KvSessions& store_;
  const std::vector<SessionSpec> specs_;
  const std::string owner_;
  std::mt19937_64 random_;
  std::map<std::size_t, Model> sessions_;
  std::map<std::size_t, bool> in_step_;
  std::vector<OpenStep> steps_;
  std::size_t numbers_ = 0, mismatches_ = 0;
  std::map<std::string, std::size_t> done_;
};

std::vector<SessionSpec> all_specs() {
  const LayerSpec full, cross{-1, 0, true};
  SessionSpec narrow =
      spec_of({full, {24, 0, false}, {24, 0, false}, {7, 20, false}, full}, CacheType::kFp16);
  narrow.layout.value_head_dim = 5;
  return {spec_of({full, full}),
          narrow,
          spec_of({full, {30, 4, false}}, CacheType::kInt8, 12),
          spec_of({full, cross, cross}, CacheType::kFp8, 12),
          spec_of({{0, 0, false}, {100, 33, false}}, CacheType::kBf16),
          spec_of({full, {24, 0, false}}, CacheType::kInt8, 12, true)};
}

KvConfig config_of(std::size_t max_bytes) {
  KvConfig config;
  config.max_bytes = max_bytes;
  config.slab_bytes = 16 << 10;
  config.promised_step = kPromisedStep;
  return config;
}

void check_nothing_left(KvSessions& store) {
  store.drop_cached();
  store.tidy();
  const KvStatistics left = store.statistics();
  CHECK(left.sessions == 0);
  CHECK(left.pages_in_use == 0);
  CHECK(left.pages_promised == 0);
  CHECK(left.pages_cached == 0);
  CHECK(left.bytes_memory == 0);
}

unsigned fresh_seed() {
  const char* given = std::getenv("ATTNSERVE_TEST_SEED");
  return given ? static_cast<unsigned>(std::atoi(given)) : std::random_device{}();
}

}  // namespace

TEST_CASE("20,000 random operations leave each session what a plain model says, and no page") {
  const unsigned seed = fresh_seed();
  CAPTURE(seed);
  KvSessions store(config_of(300 << 10));
  Machine machine(store, all_specs(), "me", seed);
  for (int action = 0; action < 20000; ++action) {
    machine.act();
    const KvStatistics now = store.statistics();
    const bool fits = now.pages_in_use <= now.pages_promised && now.bytes_memory <= now.max_bytes;
    CHECK_MESSAGE(fits, "after operation ", action);
    const bool counted = action % 16 > 0 || promised_to(store, "me") == now.bytes_promised;
    CHECK_MESSAGE(counted, "after operation ", action);
    if (!fits || !counted || machine.mismatches() > 0) break;
  }
  CHECK(machine.mismatches() == 0);
  for (const std::string name :
       {"open", "open refused", "begin", "begin refused", "layer", "step", "commit", "truncate",
        "truncate too far", "fork", "fork refused", "move", "close", "expire", "abandon",
        "close in a step", "prefix found", "wrong"}) {
    CHECK_MESSAGE(machine.done().contains(name), name);
  }
  CHECK(store.statistics().evicted_pages > 0);
  machine.close_all();
  check_nothing_left(store);
}

TEST_CASE("several callers at once on one store") {
  const unsigned seed = fresh_seed();
  CAPTURE(seed);
  KvSessions store(config_of(700 << 10));
  std::vector<Machine> machines;
  for (unsigned caller = 0; caller < 4; ++caller) {
    // Two of them share prefixes: one owner, though each knows its own sessions alone.
    machines.emplace_back(store, all_specs(), caller < 2 ? "both" : std::to_string(caller),
                          seed + caller);
  }
  std::atomic<bool> ended = false;
  std::vector<std::thread> threads;
  for (Machine& machine : machines) {
    threads.emplace_back([&machine] {
      for (int action = 0; action < 3000; ++action) machine.act();
    });
  }
  std::thread tidier([&] {
    while (!ended) {
      store.tidy();
      std::this_thread::sleep_for(1ms);
    }
  });
  for (std::thread& thread : threads) thread.join();
  ended = true;
  tidier.join();
  for (Machine& machine : machines) {
    CHECK(machine.mismatches() == 0);
    machine.close_all();
  }
  check_nothing_left(store);
}
