#include <doctest/doctest.h>

#include <algorithm>
#include <deque>
#include <numeric>

#include "attention_reference.h"
#include "base/half.h"
#include "base/status.h"
#include "engine/attend.h"
#include "fake_session.h"
#include "onnx_model.h"

using namespace attnserve;
using namespace attnserve::engine;

namespace {

constexpr float kScale = 0.25F;
constexpr std::int64_t kHeads = 4, kKvHeads = 2, kDim = 16;

std::size_t at(Feed feed) { return static_cast<std::size_t>(feed); }
std::size_t at(Result result) { return static_cast<std::size_t>(result); }

// native: output of any mask; diagnostics beside it.
std::shared_ptr<Model> native_model(const std::shared_ptr<Runtime>& runtime, Scheme mask) {
  auto model = std::make_shared<Model>();
  model->facts.bottom_right = mask.bottom_right;
  add_variant(
      *model, "native",
      load_graph(runtime, attention_graph(kOnnxFloat, kScale, mask.causal, mask.bottom_right)));
  add_variant(*model, "diagnostics",
              load_graph(runtime, diagnostics_graph(kScale, mask.causal, mask.bottom_right)));
  return model;
}

// Gives as weights what it is given as bias, of a type.
std::shared_ptr<Model> echo_model(const std::shared_ptr<Runtime>& runtime, int type) {
  auto model = std::make_shared<Model>();
  add_variant(*model, "reference",
              load_graph(runtime, {{{"Identity", "", {"bias"}, {"weights"}, {}}},
                                   {{"bias", type, {-1, -1, -1, -1}}},
                                   {{"weights", type, {-1, -1, -1, -1}}}}));
  return model;
}

// A work and all memory that it views. Results begin `shift` bytes after a multiple of 64.
class OwnedWork {
 public:
  OwnedWork(std::shared_ptr<Model> model, Sizes s, Wanted wanted, unsigned seed,
            std::size_t shift = 0)
      : sizes(s), shift_(shift) {
    std::mt19937 random(seed);
    query = normal(random, s.batch * s.num_heads * s.query_len * s.head_dim);
    key = normal(random, s.batch * s.num_kv_heads * s.key_len * s.head_dim);
    value = normal(random, s.batch * s.num_kv_heads * s.key_len * s.value_head_dim);
    for (std::int64_t i = 0; i < s.batch; ++i) {
      key_lengths.push_back(static_cast<std::int64_t>(random() % (s.key_len + 1)));
    }
    work.model = model;
    work.variant = model->variants[0].get();
    if (wanted.diagnosed() && model->variants.size() > 1) work.diagnosis = model->variants[1].get();
    work.wanted = wanted;
    work.dims = {s.batch, s.num_heads, s.query_len, s.key_len};
    set(Feed::kQuery, {s.batch, s.num_heads, s.query_len, s.head_dim}, query);
    set(Feed::kKey, {s.batch, s.num_kv_heads, s.key_len, s.head_dim}, key);
    set(Feed::kValue, {s.batch, s.num_kv_heads, s.key_len, s.value_head_dim}, value);
    set(Feed::kKeyLengths, {s.batch}, key_lengths, DataType::kInt64);
    top_k = {wanted.top_k};
    distances = {wanted.mass_by_distance};
    set(Feed::kTopK, {1}, top_k, DataType::kInt64);
    set(Feed::kDistances, {1}, distances, DataType::kInt64);

    const Shape rows = {s.batch, s.num_heads, s.query_len};
    const Shape listed = {s.batch, s.num_heads, s.query_len, wanted.top_k};
    if (wanted.output)
      place(Result::kOutput, {s.batch, s.num_heads, s.query_len, s.value_head_dim});
    if (wanted.weights) place(Result::kWeights, {s.batch, s.num_heads, s.query_len, s.key_len});
    if (wanted.entropy) place(Result::kEntropy, rows);
    if (wanted.log_sum_exp) place(Result::kLogSumExp, rows);
    if (wanted.top_k) place(Result::kTopKIndices, listed, DataType::kInt64);
    if (wanted.top_k) place(Result::kTopKWeights, listed);
    if (wanted.mass_per_key) place(Result::kMassPerKey, {s.batch, s.num_heads, s.key_len});
    if (wanted.mass_by_distance) {
      place(Result::kMassByDistance, {s.batch, s.num_heads, wanted.mass_by_distance});
    }
    work.joinable = true;
    work.key = batch_key(*model, *work.variant, work.diagnosis, wanted, work.dims, {}, false);
  }
  OwnedWork(const OwnedWork&) = delete;

  template <class T>
  void set(Feed feed, Shape shape, std::vector<T>& elements, DataType dtype = DataType::kFp32) {
    work.feeds[at(feed)] = tensor_over(dtype, shape, elements);
  }

  template <class T = float>
  std::vector<T> result(Result which) const {
    const Tensor& tensor = work.results[at(which)];
    std::vector<T> elements(tensor.shape.elements());
    std::memcpy(elements.data(), tensor.data, tensor.byte_size());
    return elements;
  }
  std::vector<double> weights(Scheme mask) const {
    return reference_weights(query, key, key_lengths, sizes, kScale, mask);
  }
  std::vector<double> output(Scheme mask) const {
    return reference_output(weights(mask), value, sizes);
  }
  void clear() {
    for (auto& memory : memory_) memory.assign(memory.size(), 0xFF);
  }

  Sizes sizes;
  std::vector<float> query, key, value;
  std::vector<std::int64_t> key_lengths, top_k, distances;
  AttendWork work;

 private:
  void place(Result which, Shape shape, DataType dtype = DataType::kFp32) {
    Tensor& tensor = work.results[at(which)];
    tensor = {dtype, shape, nullptr};
    auto& memory = memory_.emplace_back(tensor.byte_size() + 128, 0xFF);
    void* start = memory.data();
    std::size_t room = memory.size();
    tensor.data = static_cast<std::byte*>(std::align(64, tensor.byte_size(), start, room)) + shift_;
  }

  std::size_t shift_;
  std::deque<std::vector<unsigned char>> memory_;
};

std::vector<AttendWork*> together(std::deque<OwnedWork>& works) {
  std::vector<AttendWork*> pointers;
  for (OwnedWork& each : works) pointers.push_back(&each.work);
  return pointers;
}

void alone(OwnedWork& owned, Stop* stop = nullptr) {
  AttendWork* works[1] = {&owned.work};
  attend_together(works, stop);
}

Sizes ragged(std::int64_t batch, std::int64_t query_len, std::int64_t key_len) {
  return {batch, kHeads, kKvHeads, query_len, key_len, kDim, kDim};
}

Wanted everything_said(std::int64_t top_k, std::int64_t distances) {
  Wanted wanted;
  wanted.entropy = wanted.mass_per_key = true;
  wanted.top_k = top_k;
  wanted.mass_by_distance = distances;
  return wanted;
}

// What weights [B, H, Sq, Sk] say, in float64, and how far a work's results are from it. Indices
// are compared by the weights that they point to.
double diagnosis_error(const OwnedWork& owned, const std::vector<double>& weights, Scheme mask) {
  const Sizes& s = owned.sizes;
  const Wanted& wanted = owned.work.wanted;
  std::vector<double> entropy, heaviest, listed;
  std::vector<double> per_key(s.batch * s.num_heads * s.key_len);
  std::vector<double> by_distance(s.batch * s.num_heads * wanted.mass_by_distance);
  const auto indices =
      wanted.top_k ? owned.result<std::int64_t>(Result::kTopKIndices) : std::vector<std::int64_t>{};
  for (std::int64_t row = 0; row < s.batch * s.num_heads * s.query_len; ++row) {
    const std::int64_t head = row / s.query_len;
    const std::int64_t offset =
        mask.bottom_right ? owned.key_lengths[head / s.num_heads] - s.query_len : 0;
    std::vector<double> sorted(weights.begin() + row * s.key_len,
                               weights.begin() + (row + 1) * s.key_len);
    double nats = 0;
    for (std::int64_t j = 0; j < s.key_len; ++j) {
      const double weight = sorted[j];
      if (weight > 0) nats -= weight * std::log(weight);
      per_key[head * s.key_len + j] += weight;
      if (wanted.mass_by_distance) {
        const std::int64_t apart = std::abs(row % s.query_len + offset - j);
        by_distance[head * wanted.mass_by_distance +
                    std::min(apart, wanted.mass_by_distance - 1)] += weight;
      }
    }
    entropy.push_back(nats);
    for (std::int64_t i = 0; i < wanted.top_k; ++i) {
      listed.push_back(sorted[indices[row * wanted.top_k + i]]);
    }
    std::sort(sorted.rbegin(), sorted.rend());
    heaviest.insert(heaviest.end(), sorted.begin(), sorted.begin() + wanted.top_k);
  }
  double error = 0;
  const auto compare = [&](Result which, const std::vector<double>& exact) {
    error = std::max(error, largest_error(owned.result(which), exact));
  };
  if (wanted.entropy) compare(Result::kEntropy, entropy);
  if (wanted.mass_per_key) compare(Result::kMassPerKey, per_key);
  if (wanted.mass_by_distance) compare(Result::kMassByDistance, by_distance);
  if (wanted.top_k) compare(Result::kTopKWeights, heaviest);
  if (wanted.top_k) compare(Result::kTopKWeights, listed);
  return error;
}

// A model's only variant, faked.
std::shared_ptr<Model> fake_model(const std::vector<std::string>& takes, bool any_heads = false) {
  auto model = std::make_shared<Model>();
  add_variant(*model, "fake",
              std::make_unique<FakeSession>(takes, std::vector<std::string>{"output"}, any_heads));
  return model;
}

}  // namespace

TEST_CASE("a bucket's shortest length is padded by less than a quarter of what it is padded to") {
  for (std::int64_t length = 1; length <= 8; ++length) CHECK(bucket(length) == length);
  const std::pair<std::int64_t, std::int64_t> steps[] = {
      {9, 10},  {10, 10}, {11, 12}, {16, 16},     {17, 20},     {20, 20},      {21, 24},
      {33, 40}, {64, 64}, {65, 80}, {1000, 1024}, {1025, 1280}, {65536, 65536}};
  for (const auto& [length, end] : steps) CHECK(bucket(length) == end);
  for (std::int64_t length = 9; length < 5000; ++length) {
    CHECK(bucket(length) >= length);
    CHECK(4 * (bucket(length) - length) < bucket(length));
    CHECK(bucket(bucket(length)) == bucket(length));
  }
}

TEST_CASE("names are those of the protocol") {
  CHECK(name_of(Feed::kQuery) == "query");
  CHECK(name_of(Feed::kKeyLengths) == "key_lengths");
  CHECK(name_of(Feed::kTopK) == "top_k");
  CHECK(name_of(Feed::kDistances) == "distances");
  CHECK(name_of(Result::kOutput) == "output");
  CHECK(name_of(Result::kTopKWeights) == "top_k_weights");
  CHECK(name_of(Feed::kSinks) == "sinks");
  CHECK(name_of(Result::kMassByDistance) == "mass_by_distance");
  CHECK(name_of(Result::kLogSumExp) == "log_sum_exp");
}

TEST_CASE("works of one bucket have one key; whatever else differs makes another") {
  auto model = fake_model({"query", "key", "value", "key_lengths"});
  const Variant& variant = *model->variants[0];
  const auto key = [&](Dims dims, Wanted wanted = {}, std::optional<float> softcap = {},
                       bool biased = false, const Variant* diagnosis = nullptr) {
    return batch_key(*model, variant, diagnosis, wanted, dims, softcap, biased);
  };
  const BatchKey plain = key({1, 4, 33, 33});
  CHECK(plain == key({7, 4, 40, 35}));
  CHECK(plain != key({1, 4, 41, 33}));
  CHECK(plain != key({1, 4, 33, 41}));
  CHECK(plain != key({1, 4, 33, 33}, {}, 30.0F));
  CHECK(key({1, 4, 33, 33}, {}, 20.0F) != key({1, 4, 33, 33}, {}, 30.0F));
  CHECK(plain != key({1, 4, 33, 33}, {}, {}, true));
  CHECK(plain != key({1, 4, 33, 33}, {}, {}, false, &variant));
  Wanted wanted;
  wanted.weights = true;
  CHECK(plain != key({1, 4, 33, 33}, wanted));
  // What is summed over queries bears no padding.
  const Wanted said = everything_said(2, 3);
  CHECK(key({1, 4, 33, 33}, said) == key({2, 4, 33, 33}, said));
  CHECK(key({1, 4, 33, 33}, said) != key({1, 4, 34, 33}, said));
  CHECK(key({1, 4, 33, 33}, said) != key({1, 4, 33, 34}, said));
  CHECK(key({1, 4, 33, 33}, said) != key({1, 4, 33, 33}, everything_said(3, 3)));
  CHECK(key({1, 4, 33, 33}, said) != key({1, 4, 33, 33}, everything_said(2, 4)));

  const auto other = fake_model({"query", "key", "value", "key_lengths"});
  CHECK(plain != batch_key(*other, *other->variants[0], nullptr, {}, {1, 4, 33, 33}, {}, false));
}

TEST_CASE("without key_lengths, or at the last position, lengths are not padded") {
  const auto unmasked = fake_model({"query", "key", "value"});
  const auto key = [](const Model& model, Dims dims) {
    return batch_key(model, *model.variants[0], nullptr, {}, dims, {}, false);
  };
  CHECK(key(*unmasked, {1, 4, 33, 33}) != key(*unmasked, {1, 4, 33, 34}));
  CHECK(key(*unmasked, {1, 4, 33, 33}) != key(*unmasked, {1, 4, 34, 33}));
  const auto last = fake_model({"query", "key", "value", "key_lengths"});
  last->facts.bottom_right = true;
  CHECK(key(*last, {1, 4, 33, 33}) == key(*last, {1, 4, 33, 34}));
  CHECK(key(*last, {1, 4, 33, 33}) != key(*last, {1, 4, 34, 33}));
}

TEST_CASE("a work alone is computed in place, aligned or not") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const Scheme mask = {true, false};
  const auto model = native_model(runtime, mask);
  for (const std::size_t shift : {0, 3}) {
    OwnedWork owned(model, ragged(3, 21, 21), {}, 5, shift);
    alone(owned);
    CHECK(largest_error(owned.result(Result::kOutput), owned.output(mask)) < 1e-5);
  }
}

TEST_CASE("ragged works together give each the bits that it gets alone") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  for (const Scheme mask : {Scheme{false, false}, Scheme{true, false}, Scheme{true, true}}) {
    const auto model = native_model(runtime, mask);
    std::deque<OwnedWork> works;
    Wanted wanted;
    wanted.log_sum_exp = true;
    unsigned seed = 0;
    for (const auto& [batch, query_len, key_len] :
         {std::tuple{1, 130, 200}, std::tuple{3, 141, 193}, std::tuple{2, 160, 224},
          std::tuple{1, 160, 193}}) {
      const std::int64_t rows = mask.bottom_right ? 130 : query_len;
      works.emplace_back(model, ragged(batch, rows, key_len), wanted, seed, seed % 2);
      ++seed;
      CHECK(works.back().work.key == works.front().work.key);
    }
    works[1].key_lengths = {0, 193, 1};  // a sequence of no key at all
    attend_together(together(works), nullptr);
    for (OwnedWork& each : works) {
      const auto joined = each.result(Result::kOutput);
      const auto log_sum_exp = each.result(Result::kLogSumExp);
      CHECK(largest_error(joined, each.output(mask)) < 1e-5);
      each.clear();
      alone(each);
      CHECK(joined == each.result(Result::kOutput));
      CHECK(log_sum_exp == each.result(Result::kLogSumExp));
    }
  }
}

TEST_CASE("single queries over unlike many keys run together") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const Scheme mask = {true, true};
  const auto model = native_model(runtime, mask);
  std::deque<OwnedWork> works;
  for (unsigned i = 0; i < 5; ++i)
    works.emplace_back(model, ragged(1 + i % 2, 1, 97 + 3 * i), Wanted{}, i);
  attend_together(together(works), nullptr);
  for (OwnedWork& each : works) {
    const auto joined = each.result(Result::kOutput);
    CHECK(largest_error(joined, each.output(mask)) < 1e-5);
    each.clear();
    alone(each);
    CHECK(joined == each.result(Result::kOutput));
  }
}

TEST_CASE("a diagnosis comes from its own variant, alone and together") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  for (const Scheme mask : {Scheme{true, false}, Scheme{true, true}}) {
    const auto model = native_model(runtime, mask);
    std::deque<OwnedWork> works;
    for (unsigned i = 0; i < 3; ++i) {
      works.emplace_back(model, ragged(1 + i, 30, 30), everything_said(4, 6), i, i);
    }
    attend_together(together(works), nullptr);
    for (OwnedWork& each : works) {
      CHECK(largest_error(each.result(Result::kOutput), each.output(mask)) < 1e-5);
      CHECK(diagnosis_error(each, each.weights(mask), mask) < 1e-4);
    }
  }
}

TEST_CASE("a diagnosis without output runs its own variant alone") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const Scheme mask = {true, false};
  const auto model = native_model(runtime, mask);
  Wanted wanted;
  wanted.output = false;
  wanted.entropy = true;
  OwnedWork owned(model, ragged(2, 12, 12), wanted, 3);
  owned.work.variant = owned.work.diagnosis;
  owned.work.feeds[at(Feed::kValue)].data = nullptr;
  alone(owned);
  CHECK(diagnosis_error(owned, owned.weights(mask), mask) < 1e-5);
}

TEST_CASE("without a diagnosis what weights say comes from the weights themselves") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const std::tuple<int, DataType, double> types[] = {{kOnnxFloat, DataType::kFp32, 1e-5},
                                                     {kOnnxHalf, DataType::kFp16, 1e-2},
                                                     {kOnnxBFloat, DataType::kBf16, 1e-1}};
  for (const auto& [type, dtype, tolerance] : types) {
    const auto model = echo_model(runtime, type);
    for (const bool bottom_right : {false, true}) {
      model->facts.bottom_right = bottom_right;
      const Scheme mask = {true, bottom_right};
      Wanted wanted = everything_said(5, 4);
      wanted.output = false;
      OwnedWork owned(model, ragged(2, 9, 14), wanted, 8, 1);
      owned.key_lengths = {14, 6};
      const std::vector<double> exact = owned.weights(mask);
      std::vector<float> single(exact.begin(), exact.end());
      std::vector<std::uint16_t> narrow;
      for (const float weight : single) {
        narrow.push_back(type == kOnnxHalf ? half_of_float(weight) : bfloat16_of_float(weight));
      }
      const Shape shape = {2, kHeads, 9, 14};
      if (type == kOnnxFloat) owned.set(Feed::kBias, shape, single);
      if (type != kOnnxFloat) owned.set(Feed::kBias, shape, narrow, dtype);
      alone(owned);
      CHECK(diagnosis_error(owned, exact, mask) < tolerance);
    }
  }
}

TEST_CASE("of equal weights the earlier key comes first; rows that see nothing have no entropy") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const auto model = echo_model(runtime, kOnnxFloat);
  Wanted wanted = everything_said(4, 0);
  wanted.output = false;
  wanted.weights = true;
  OwnedWork owned(model, {1, 1, 1, 4, 5, 8, 8}, wanted, 1);
  const float nan = NAN;
  std::vector<float> weights = {0.25F, 0, 0.25F, 0.25F, 0.25F,  // alike
                                0,     0, 0,     0,     0,      // none
                                0,     0, 0,     1,     0,      // one
                                nan,   0, 0.5F,  0.25F, 0.25F};
  owned.set(Feed::kBias, {1, 1, 4, 5}, weights);
  alone(owned);
  CHECK(owned.result<std::int64_t>(Result::kTopKIndices) ==
        std::vector<std::int64_t>{0, 2, 3, 4, 0, 1, 2, 3, 3, 0, 1, 2, 2, 3, 4, 1});
  CHECK(owned.result(Result::kTopKWeights) == std::vector<float>{0.25F, 0.25F, 0.25F, 0.25F, 0, 0,
                                                                 0, 0, 1, 0, 0, 0, 0.5F, 0.25F,
                                                                 0.25F, 0});
  const auto entropy = owned.result(Result::kEntropy);
  CHECK(entropy[0] == doctest::Approx(std::log(4.0)));
  CHECK(entropy[1] == 0);
  CHECK_FALSE(std::signbit(entropy[1]));
  CHECK(entropy[2] == 0);
  CHECK_FALSE(std::signbit(entropy[2]));
  CHECK(std::isnan(entropy[3]));
  const auto given = owned.result(Result::kWeights);
  CHECK(std::equal(given.begin(), given.begin() + 15, weights.begin()));
}

TEST_CASE("layers are joined by position, with a context of its own length") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  // output = hidden_states + the largest of the context: what padding holds would show.
  auto model = std::make_shared<Model>();
  add_variant(
      *model, "layer",
      load_graph(runtime, {{{"ReduceSum", "", {"context"}, {"whole"}, {{"keepdims", false, 0, 1}}},
                            {"Cast", "", {"key_lengths"}, {"lengths"}, {{"to", false, 0, 1}}},
                            {"ReduceSum", "", {"lengths"}, {"count"}, {{"keepdims", false, 0, 0}}},
                            {"Mul", "", {"hidden_states", "whole"}, {"scaled"}, {}},
                            {"Add", "", {"scaled", "count"}, {"output"}, {}}},
                           {{"hidden_states", kOnnxFloat, {-1, -1, 3}},
                            {"context", kOnnxFloat, {-1, -1, 2}},
                            {"key_lengths", kOnnxInt64, {-1}}},
                           {{"output", kOnnxFloat, {-1, -1, 3}}}}));
  struct Layer {
    std::vector<float> hidden, context, output;
    std::vector<std::int64_t> lengths;
    AttendWork work;
  };
  std::deque<Layer> layers;
  std::vector<AttendWork*> pointers;
  double whole = 0, count = 0;
  for (std::int64_t i = 0; i < 3; ++i) {
    Layer& layer = layers.emplace_back();
    const Dims dims = {1 + i, 2, 9 + i % 2, 18 - i};
    std::mt19937 random(static_cast<unsigned>(i));
    layer.hidden = normal(random, dims.batch * dims.query_len * 3);
    layer.context = normal(random, dims.batch * dims.key_len * 2);
    layer.output.assign(layer.hidden.size(), NAN);
    layer.lengths.assign(dims.batch, dims.key_len);
    whole = std::accumulate(layer.context.begin(), layer.context.end(), whole);
    count += static_cast<double>(dims.batch * dims.key_len);
    layer.work.model = model;
    layer.work.variant = model->variants[0].get();
    layer.work.dims = dims;
    layer.work.feeds[at(Feed::kHiddenStates)] =
        tensor_over(DataType::kFp32, {dims.batch, dims.query_len, 3}, layer.hidden);
    layer.work.feeds[at(Feed::kContext)] =
        tensor_over(DataType::kFp32, {dims.batch, dims.key_len, 2}, layer.context);
    layer.work.feeds[at(Feed::kKeyLengths)] =
        tensor_over(DataType::kInt64, {dims.batch}, layer.lengths);
    layer.work.results[at(Result::kOutput)] =
        tensor_over(DataType::kFp32, {dims.batch, dims.query_len, 3}, layer.output);
    pointers.push_back(&layer.work);
  }
  attend_together(pointers, nullptr);
  for (const Layer& layer : layers) {
    std::vector<double> exact;
    for (const float state : layer.hidden) exact.push_back(state * whole + count);
    CHECK(largest_error(layer.output, exact) < 1e-3);
  }
}

TEST_CASE("parts of a work's heads give the bits of the whole") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const auto model = native_model(runtime, {true, false});
  OwnedWork whole(model, ragged(1, 50, 50), {}, 4);
  alone(whole);
  const auto expected = whole.result(Result::kOutput);
  whole.clear();
  for (std::int64_t head = 0; head < kKvHeads; ++head) {
    AttendWork part = part_of(whole.work, head, head + 1);
    CHECK(part.dims.num_heads == kHeads / kKvHeads);
    CHECK_FALSE(part.joinable);
    CHECK(part.key != whole.work.key);
    AttendWork* parts[1] = {&part};
    attend_together(parts, nullptr);
  }
  CHECK(whole.result(Result::kOutput) == expected);
}

TEST_CASE("heads are computed by themselves for one large sequence's output alone") {
  const auto model = fake_model({"query", "key", "value", "key_lengths"}, true);
  constexpr std::size_t kLarge = 2 << 20;
  AttendWork work;
  work.model = model;
  work.variant = model->variants[0].get();
  work.joinable = true;
  CHECK(divisible(work, kLarge));
  CHECK_FALSE(divisible(work, kLarge - 1));
  const auto without = [&](auto change) {
    AttendWork changed = work;
    change(changed);
    return divisible(changed, kLarge);
  };
  CHECK_FALSE(without([](AttendWork& changed) { changed.dims.batch = 2; }));
  CHECK_FALSE(without([](AttendWork& changed) { changed.joinable = false; }));
  CHECK_FALSE(without([](AttendWork& changed) { changed.wanted.weights = true; }));
  CHECK_FALSE(without([](AttendWork& changed) { changed.wanted.entropy = true; }));
  const auto fixed = fake_model({"query", "key", "value", "key_lengths"}, false);
  CHECK_FALSE(without([&](AttendWork& changed) { changed.variant = fixed->variants[0].get(); }));
}

TEST_CASE("a result that is wanted and has no place is an error of ours") {
  const auto model = fake_model({"query", "key", "value"});
  AttendWork work;
  work.model = model;
  work.variant = model->variants[0].get();
  AttendWork* works[1] = {&work};
  CHECK_THROWS_AS(attend_together(works, nullptr), std::logic_error);
}

TEST_CASE("a stop ends what is computed from weights too") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const auto model = echo_model(runtime, kOnnxFloat);
  Wanted wanted = everything_said(64, 4);
  wanted.output = false;
  OwnedWork owned(model, {1, 4, 4, 400, 400, 1, 1}, wanted, 1);
  std::vector<float> weights(4 * 400 * 400, 1 / 400.0F);
  owned.set(Feed::kBias, {1, 4, 400, 400}, weights);
  // Stops once the run is over: what is asked before and after it is not yet.
  class LateStop final : public Stop {
   public:
    void request() override {}
    bool requested() const override { return ++asked_ > 100; }

   private:
    mutable int asked_ = 0;
  } late;
  class PassedOn final : public Session {
   public:
    explicit PassedOn(Session& whole) : whole_(whole) {}
    const std::vector<Port>& inputs() const override { return whole_.inputs(); }
    const std::vector<Port>& outputs() const override { return whole_.outputs(); }
    bool any_heads() const override { return false; }
    void run(std::span<const Feed> feeds, std::span<Fetch> fetches, Stop*) override {
      whole_.run(feeds, fetches, nullptr);
    }
    std::unique_ptr<Stop> make_stop() override { return nullptr; }

   private:
    Session& whole_;
  };
  Variant passing;
  passing.session = std::make_unique<PassedOn>(*owned.work.variant->session);
  owned.work.variant = &passing;
  try {
    alone(owned, &late);
    FAIL("it ran to its end");
  } catch (const RequestError& error) {
    CHECK(error.status().code == Code::kCancelled);
  }
}
