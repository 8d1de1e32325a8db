#include <doctest/doctest.h>

#include <cstring>
#include <deque>

#include "engine/tokens.h"
#include "fake_session.h"
#include "onnx_model.h"

using namespace attnserve;
using namespace attnserve::engine;

namespace {

TokenSequences sequences(const std::vector<std::vector<std::int64_t>>& rows) {
  TokenSequences made;
  for (const auto& row : rows) {
    made.ids.insert(made.ids.end(), row.begin(), row.end());
    made.starts.push_back(made.ids.size());
  }
  return made;
}

// last_hidden_state [B, S] = 10 * input_ids + attention_mask; bias [2, S] of no sequence.
std::shared_ptr<Model> encoder(const std::shared_ptr<Runtime>& runtime) {
  auto model = std::make_shared<Model>();
  model->facts.kind = Kind::kTransformer;
  model->facts.pad_token_id = 7;
  model->facts.hidden_size = 16;
  const Graph graph = {
      {{"Add", "", {"input_ids", "input_ids"}, {"twice"}, {}},
       {"Add", "", {"twice", "attention_mask"}, {"last_hidden_state"}, {}},
       {"ReduceSum", "", {"attention_mask"}, {"sum"}, {{"keepdims", false, 0, 1}}},
       {"Concat", "", {"sum", "sum"}, {"main_position_bias"}, {{"axis", false, 0, 0}}}},
      {{"input_ids", kOnnxInt64, {-1, -1}}, {"attention_mask", kOnnxInt64, {-1, -1}}},
      {{"last_hidden_state", kOnnxInt64, {-1, -1}}, {"main_position_bias", kOnnxInt64, {2, -1}}}};
  add_variant(*model, "fused", load_graph(runtime, graph));
  return model;
}

TokensWork work_of(const std::shared_ptr<Model>& model, TokenSequences source,
                   std::vector<std::string> outputs = {"last_hidden_state"}) {
  TokensWork work;
  work.model = model;
  work.variant = model->variants[0].get();
  work.source = std::move(source);
  work.outputs = std::move(outputs);
  return work;
}

std::vector<std::int64_t> elements(const OwnedTensor& owned) {
  std::vector<std::int64_t> values(owned.tensor.shape.elements());
  std::memcpy(values.data(), owned.tensor.data, owned.tensor.byte_size());
  return values;
}

}  // namespace

TEST_CASE("sequences know how many they are and how long the longest is") {
  CHECK(TokenSequences{}.count() == 0);
  CHECK(TokenSequences{}.longest() == 0);
  const TokenSequences three = sequences({{1, 2}, {3}, {4, 5, 6}});
  CHECK(three.count() == 3);
  CHECK(three.longest() == 3);
}

TEST_CASE("sequences of one request are padded with its model's token and masked") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const auto model = encoder(runtime);
  TokensWork work = work_of(model, sequences({{1, 2, 3}, {4}}));
  TokensWork* works[1] = {&work};
  attend_tokens_together(works, nullptr);
  REQUIRE(work.results.size() == 1);
  CHECK(work.padded_source == 3);
  CHECK(work.padded_target == 0);
  CHECK(work.results[0].tensor.dtype == DataType::kInt64);
  CHECK(work.results[0].tensor.shape == Shape{2, 3});
  CHECK(elements(work.results[0]) == std::vector<std::int64_t>{3, 5, 7, 9, 14, 14});
}

TEST_CASE("several requests run as one, and each gets its own rows of what it wants") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const auto model = encoder(runtime);
  std::deque<TokensWork> works;
  works.push_back(work_of(model, sequences({{1}, {2, 3}})));
  works.push_back(
      work_of(model, sequences({{5, 5, 5, 5}}), {"main_position_bias", "last_hidden_state"}));
  works.push_back(work_of(model, sequences({{6}}), {"main_position_bias"}));
  std::vector<TokensWork*> pointers;
  for (TokensWork& work : works) pointers.push_back(&work);
  attend_tokens_together(pointers, nullptr);
  CHECK(works[0].padded_source == 4);
  CHECK(works[0].results[0].tensor.shape == Shape{2, 4});
  CHECK(elements(works[0].results[0]) == std::vector<std::int64_t>{3, 14, 14, 14, 5, 7, 14, 14});
  CHECK(elements(works[1].results[1]) == std::vector<std::int64_t>{11, 11, 11, 11});
  CHECK(works[1].results[0].tensor.shape == Shape{2, 1});  // of no sequence: whole
  CHECK(works[2].results[0].tensor.shape == Shape{2, 1});
  CHECK(elements(works[2].results[0]) == std::vector<std::int64_t>{8, 8});
  // What one request holds needs neither the others nor the model.
  const OwnedTensor last = works[0].results[0];
  works.clear();
  CHECK(elements(last)[4] == 5);
}

TEST_CASE("kinds of tokens are padded beside their ids, and 0 where a request says nothing") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  auto model = std::make_shared<Model>();
  model->facts.pad_token_id = 7;
  add_variant(*model, "fused",
              load_graph(runtime, {{{"Mul", "", {"input_ids", "token_type_ids"}, {"product"}, {}},
                                    {"Add", "", {"product", "attention_mask"}, {"last"}, {}}},
                                   {{"input_ids", kOnnxInt64, {-1, -1}},
                                    {"attention_mask", kOnnxInt64, {-1, -1}},
                                    {"token_type_ids", kOnnxInt64, {-1, -1}}},
                                   {{"last", kOnnxInt64, {-1, -1}}},
                                   {"token_type_ids"}}));
  CHECK(model->variants[0]->session->takes("token_type_ids"));
  std::deque<TokensWork> works;
  works.push_back(work_of(model, sequences({{10, 20}, {30, 40, 50}}), {"last"}));
  works.back().source_types = {0, 1, 1, 2, 0};
  works.push_back(work_of(model, sequences({{60}}), {"last"}));
  TokensWork* pointers[2] = {&works[0], &works[1]};
  attend_tokens_together(pointers, nullptr);
  CHECK(elements(works[0].results[0]) == std::vector<std::int64_t>{1, 21, 0, 31, 81, 1});
  CHECK(elements(works[1].results[0]) == std::vector<std::int64_t>{1, 0, 0});
}

TEST_CASE("a decoder's tokens go by its own names and length") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  auto model = std::make_shared<Model>();
  model->facts.pad_token_id = 0;
  add_variant(
      *model, "fused",
      load_graph(runtime,
                 {{{"Add", "", {"input_ids", "attention_mask"}, {"encoder_last_hidden_state"}, {}},
                   {"Add",
                    "",
                    {"decoder_input_ids", "decoder_attention_mask"},
                    {"last_hidden_state"},
                    {}}},
                  {{"input_ids", kOnnxInt64, {-1, -1}},
                   {"attention_mask", kOnnxInt64, {-1, -1}},
                   {"decoder_input_ids", kOnnxInt64, {-1, -1}},
                   {"decoder_attention_mask", kOnnxInt64, {-1, -1}}},
                  {{"last_hidden_state", kOnnxInt64, {-1, -1}},
                   {"encoder_last_hidden_state", kOnnxInt64, {-1, -1}}}}));
  TokensWork work =
      work_of(model, sequences({{1, 2}, {3}}), {"last_hidden_state", "encoder_last_hidden_state"});
  work.target = sequences({{10}, {20, 30, 40}});
  TokensWork* works[1] = {&work};
  attend_tokens_together(works, nullptr);
  CHECK(work.padded_source == 2);
  CHECK(work.padded_target == 3);
  CHECK(elements(work.results[0]) == std::vector<std::int64_t>{11, 0, 0, 21, 31, 41});
  CHECK(elements(work.results[1]) == std::vector<std::int64_t>{2, 3, 4, 0});
}

TEST_CASE("token works of one bucket and the same outputs have one key") {
  auto model = std::make_shared<Model>();
  model->facts.hidden_size = 16;
  add_variant(
      *model, "fused",
      std::make_unique<FakeSession>(std::vector<std::string>{}, std::vector<std::string>{}));
  const auto row = [](std::size_t length) { return std::vector<std::int64_t>(length, 1); };
  const TokensWork plain = work_of(model, sequences({row(33)}));
  CHECK(batch_key(plain) == batch_key(work_of(model, sequences({row(40), row(2)}))));
  CHECK(batch_key(plain) != batch_key(work_of(model, sequences({row(41)}))));
  CHECK(batch_key(plain) != batch_key(work_of(model, sequences({row(33)}), {"weights_0"})));
  TokensWork decoding = plain;
  decoding.target = sequences({row(3)});
  CHECK(batch_key(plain) != batch_key(decoding));
  CHECK(hidden_bytes(plain) == 4 * 33 * 16);
  CHECK(hidden_bytes(decoding) == 4 * 36 * 16);
}

namespace {

// last_hidden_state [B, S, 2] = 2 * inputs_embeds; seen [B, S] = 2 * attention_mask.
std::shared_ptr<Model> embedder(const std::shared_ptr<Runtime>& runtime) {
  auto model = std::make_shared<Model>();
  model->facts.kind = Kind::kTransformer;
  model->facts.hidden_size = 2;
  const Graph graph = {
      {{"Add", "", {"inputs_embeds", "inputs_embeds"}, {"last_hidden_state"}, {}},
       {"Add", "", {"attention_mask", "attention_mask"}, {"seen"}, {}}},
      {{"inputs_embeds", kOnnxFloat, {-1, -1, 2}}, {"attention_mask", kOnnxInt64, {-1, -1}}},
      {{"last_hidden_state", kOnnxFloat, {-1, -1, 2}}, {"seen", kOnnxInt64, {-1, -1}}}};
  add_variant(*model, "fused_embeds", load_graph(runtime, graph));
  return model;
}

TokensWork work_of_rows(const std::shared_ptr<Model>& model, std::vector<float>& elements,
                        Shape shape, std::vector<std::int64_t> lengths) {
  TokensWork work;
  work.model = model;
  work.variant = model->variants[0].get();
  work.given.name = "inputs_embeds";
  work.given.mask_name = "attention_mask";
  work.given.tokens = shape[1];
  work.given.tensor = {DataType::kFp32, shape, reinterpret_cast<std::byte*>(elements.data())};
  work.given.lengths = std::move(lengths);
  work.outputs = {"last_hidden_state", "seen"};
  return work;
}

std::vector<float> floats(const OwnedTensor& owned) {
  std::vector<float> values(static_cast<std::size_t>(owned.tensor.shape.elements()));
  std::memcpy(values.data(), owned.tensor.data, owned.tensor.byte_size());
  return values;
}

}  // namespace

TEST_CASE("a tensor in the place of ids is read where it lies, and its padding is masked") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const auto model = embedder(runtime);
  std::vector<float> rows = {1, 2, 3, 4, 5, 6, 0, 0};
  TokensWork work = work_of_rows(model, rows, {2, 2, 2}, {2, 1});
  CHECK(work.count() == 2);
  CHECK(work.longest_source() == 2);
  TokensWork* works[1] = {&work};
  attend_tokens_together(works, nullptr);
  CHECK(work.results[0].tensor.shape == Shape{2, 2, 2});
  CHECK(floats(work.results[0]) == std::vector<float>{2, 4, 6, 8, 10, 12, 0, 0});
  CHECK(elements(work.results[1]) == std::vector<std::int64_t>{2, 2, 2, 0});
}

TEST_CASE("tensors of several requests run as one, as long as the longest") {
  const auto runtime = test_runtime();
  if (!runtime) return;
  const auto model = embedder(runtime);
  std::vector<float> one = {1, 2, 3, 4}, other = {5, 6, 7, 8, 9, 10};
  TokensWork first = work_of_rows(model, one, {2, 1, 2}, {1, 1});
  TokensWork second = work_of_rows(model, other, {1, 3, 2}, {3});
  TokensWork* works[2] = {&first, &second};
  attend_tokens_together(works, nullptr);
  CHECK(first.results[0].tensor.shape == Shape{2, 3, 2});
  CHECK(floats(first.results[0]) == std::vector<float>{2, 4, 0, 0, 0, 0, 6, 8, 0, 0, 0, 0});
  CHECK(floats(second.results[0]) == std::vector<float>{10, 12, 14, 16, 18, 20});
  CHECK(elements(first.results[1]) == std::vector<std::int64_t>{2, 0, 0, 2, 0, 0});
  CHECK(elements(second.results[1]) == std::vector<std::int64_t>{2, 2, 2});
}

TEST_CASE("works of tensors have one key if they are about as long, and count their elements") {
  auto model = std::make_shared<Model>();
  model->facts.hidden_size = 16;
  add_variant(
      *model, "fused_embeds",
      std::make_unique<FakeSession>(std::vector<std::string>{}, std::vector<std::string>{}));
  std::vector<float> elements(2 * 41 * 2);
  const TokensWork plain = work_of_rows(model, elements, {1, 33, 2}, {33});
  CHECK(batch_key(plain) == batch_key(work_of_rows(model, elements, {2, 40, 2}, {40, 3})));
  CHECK(batch_key(plain) != batch_key(work_of_rows(model, elements, {1, 41, 2}, {41})));
  CHECK(hidden_bytes(plain) == 4 * 33 * 16 + 4 * 33 * 2);
}
