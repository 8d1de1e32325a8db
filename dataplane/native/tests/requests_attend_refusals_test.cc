#include <doctest/doctest.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "requests/attend.h"
#include "requests_support.h"

namespace attnserve::requests {
namespace {

struct Refusal {
  std::string name;
  std::function<void(Request&, World&)> change;  // to a request that would be answered
  Code code;
  std::string message;
};

void half(Request& request) {
  request.message.model = "half";
  request.all({1, 4, 3, 8}, DataType::kFp16);
}

void brain(Request& request) {
  request.message.model = "brain";
  request.all({1, 4, 3, 8}, DataType::kBf16);
}

void layer_of(Request& request, std::string_view model) {
  request.query().reset();
  request.key().reset();
  request.value().reset();
  request.message.model = model;
  request.hidden_states() = request.tensor({1, 3, 32});
}

// The messages are the API's: callers have read them since the first version.
const std::vector<Refusal> kRefusals{
    {"no model", [](Request& r, World&) { r.message.model = ""; }, Code::kInvalidArgument,
     "model: given nothing; allowed: a name that ListModels gives"},
    {"unknown model", [](Request& r, World&) { r.message.model = "nope"; }, Code::kNotFound,
     "model: given 'nope'; models here: bare, bert, brain, capped, causal, cross, grouped, half, "
     "masked, self"},
    {"unknown version",
     [](Request& r, World&) {
       r.message.model = "grouped";
       r.message.version = "7";
     },
     Code::kNotFound, "version: given '7'; versions of grouped: 1, 10"},
    {"unknown variant", [](Request& r, World&) { r.message.variant = "x"; }, Code::kNotFound,
     "variant: given 'x'; model causal version 1 has: native, fused, reference, softcap, "
     "diagnostics"},
    {"missing query", [](Request& r, World&) { r.query().reset(); }, Code::kInvalidArgument,
     "query: given nothing; allowed: [B, H, Sq, D] for core models"},
    {"missing key", [](Request& r, World&) { r.key().reset(); }, Code::kInvalidArgument,
     "key: given nothing; allowed: [B, Hkv, Sk, D] for core models"},
    {"missing value", [](Request& r, World&) { r.value().reset(); }, Code::kInvalidArgument,
     "value: given nothing; allowed: [B, Hkv, Sk, Dv] for core models"},
    {"wrong rank", [](Request& r, World&) { r.query() = r.tensor({4, 3, 8}); },
     Code::kInvalidArgument,
     "query.shape: given [4, 3, 8] of rank 3; allowed: rank 4, [B, H, Sq, D]"},
    {"no shape", [](Request& r, World&) { r.query() = r.sized({}, 4); }, Code::kInvalidArgument,
     "query.shape: given [] of rank 0; allowed: rank 4, [B, H, Sq, D]"},
    {"head mismatch", [](Request& r, World&) { r.query() = r.tensor({1, 3, 3, 8}); },
     Code::kInvalidArgument,
     "query.shape: given [1, 3, 3, 8]; allowed: 4 at axis 1 (num_heads of the model)"},
    {"kv head mismatch", [](Request& r, World&) { r.key() = r.tensor({1, 2, 3, 8}); },
     Code::kInvalidArgument,
     "key.shape: given [1, 2, 3, 8]; allowed: 4 at axis 1 (num_kv_heads of the model)"},
    {"head_dim mismatch", [](Request& r, World&) { r.query() = r.tensor({1, 4, 3, 9}); },
     Code::kInvalidArgument,
     "query.shape: given [1, 4, 3, 9]; allowed: 8 at axis 3 (head_dim of the model)"},
    {"head_dim of key", [](Request& r, World&) { r.key() = r.tensor({1, 4, 3, 9}); },
     Code::kInvalidArgument,
     "key.shape: given [1, 4, 3, 9]; allowed: 8 at axis 3 (head_dim of the model)"},
    {"value_head_dim mismatch", [](Request& r, World&) { r.value() = r.tensor({1, 4, 3, 9}); },
     Code::kInvalidArgument,
     "value.shape: given [1, 4, 3, 9]; allowed: 8 at axis 3 (value_head_dim of the model)"},
    {"value heads", [](Request& r, World&) { r.value() = r.tensor({1, 2, 3, 8}); },
     Code::kInvalidArgument,
     "value.shape: given [1, 2, 3, 8]; allowed: 4 at axis 1 (num_kv_heads of the model)"},
    {"key and value lengths", [](Request& r, World&) { r.value() = r.tensor({1, 4, 2, 8}); },
     Code::kInvalidArgument,
     "value.shape: given [1, 4, 2, 8]; allowed: 3 at axis 2 (Sk, as key has)"},
    {"batch mismatch", [](Request& r, World&) { r.key() = r.tensor({2, 4, 3, 8}); },
     Code::kInvalidArgument,
     "key.shape: given [2, 4, 3, 8]; allowed: 1 at axis 0 (batch B, as the first tensor has)"},
    {"batch of value", [](Request& r, World&) { r.value() = r.tensor({2, 4, 3, 8}); },
     Code::kInvalidArgument,
     "value.shape: given [2, 4, 3, 8]; allowed: 1 at axis 0 (batch B, as the first tensor has)"},
    {"bytes too few", [](Request& r, World&) { r.key() = r.sized({1, 4, 3, 8}, 383); },
     Code::kInvalidArgument,
     "key.data: given 383 bytes; allowed: 384 bytes, as shape [1, 4, 3, 8] of FP32 takes"},
    {"bytes too many", [](Request& r, World&) { r.key() = r.sized({1, 4, 3, 8}, 385); },
     Code::kInvalidArgument,
     "key.data: given 385 bytes; allowed: 384 bytes, as shape [1, 4, 3, 8] of FP32 takes"},
    {"no bytes", [](Request& r, World&) { r.key() = r.sized({1, 4, 3, 8}, 0); },
     Code::kInvalidArgument,
     "key.data: given 0 bytes; allowed: 384 bytes, as shape [1, 4, 3, 8] of FP32 takes"},
    {"no content",
     [](Request& r, World&) { r.key()->content = wire::TensorMessage::Content::kNone; },
     Code::kInvalidArgument, "key.data: given nothing; allowed: 384 bytes"},
    {"zero dim", [](Request& r, World&) { r.key() = r.tensor({1, 4, 0, 8}); },
     Code::kInvalidArgument,
     "key.shape: given [1, 4, 0, 8]; allowed: [B, Hkv, Sk, D], each at least 1"},
    {"negative dim", [](Request& r, World&) { r.key() = r.sized({1, 4, -3, 8}, 0); },
     Code::kInvalidArgument,
     "key.shape: given [1, 4, -3, 8]; allowed: [B, Hkv, Sk, D], each at least 1"},
    {"overflowing dims",
     [](Request& r, World&) { r.key() = r.sized({1LL << 40, 1LL << 40, 1LL << 40, 1LL << 40}, 0); },
     Code::kInvalidArgument,
     "key.shape: given [1099511627776, 1099511627776, 1099511627776, 1099511627776], "
     "5846006549323611672814739330865132078623730171904 bytes; allowed: less than 2^63 bytes"},
    {"longest dims",
     [](Request& r, World&) { r.key() = r.sized(std::vector<std::int64_t>(4, INT64_MAX), 0); },
     Code::kInvalidArgument,
     "key.shape: given [9223372036854775807, 9223372036854775807, 9223372036854775807, "
     "9223372036854775807], "
     "28948022309329048843338542781398615437687611521520438958292358805051146240004 bytes; "
     "allowed: less than 2^63 bytes"},
    {"just too many bytes",
     [](Request& r, World&) { r.key() = r.sized({1LL << 30, 1LL << 31, 1, 1}, 0); },
     Code::kInvalidArgument,
     "key.shape: given [1073741824, 2147483648, 1, 1], 9223372036854775808 bytes; allowed: less "
     "than 2^63 bytes"},
    {"just few enough bytes",
     [](Request& r, World&) { r.key() = r.sized({(1LL << 61) - 1, 1, 1, 1}, 0); },
     Code::kInvalidArgument,
     "key.data: given 0 bytes; allowed: 9223372036854775804 bytes, as shape [2305843009213693951, "
     "1, 1, 1] of FP32 takes"},
    {"no dtype", [](Request& r, World&) { r.key()->dtype = 0; }, Code::kInvalidArgument,
     "key.dtype: given DATA_TYPE_UNSPECIFIED; allowed: FP32"},
    {"unknown dtype", [](Request& r, World&) { r.key()->dtype = 99; }, Code::kInvalidArgument,
     "key.dtype: given 99; allowed: FP32"},
    {"negative dtype", [](Request& r, World&) { r.key()->dtype = -3; }, Code::kInvalidArgument,
     "key.dtype: given -3; allowed: FP32"},
    {"wrong dtype", [](Request& r, World&) { r.key() = r.tensor({1, 4, 3, 8}, DataType::kFp16); },
     Code::kInvalidArgument, "key.dtype: given FP16; allowed: FP32"},
    {"BF16", [](Request& r, World&) { r.key() = r.tensor({1, 4, 3, 8}, DataType::kBf16); },
     Code::kInvalidArgument, "key.dtype: given BF16; allowed: FP32"},
    {"chunks in a unary call", [](Request& r, World&) { r.key() = Request::chunked(384); },
     Code::kInvalidArgument, "key.chunked: given set; allowed: data; chunks go over AttendStream"},
    {"region without a name", [](Request& r, World&) { r.key() = Request::shared("", 0, 384); },
     Code::kInvalidArgument,
     "key.shared_memory.name: given nothing; allowed: a name that RegisterSharedMemory answered"},
    {"region unaligned", [](Request& r, World&) { r.key() = Request::shared("a", 8, 384); },
     Code::kInvalidArgument, "key.shared_memory.offset: given 8; allowed: a multiple of 64"},
    {"region of another size", [](Request& r, World&) { r.key() = Request::shared("a", 0, 380); },
     Code::kInvalidArgument,
     "key.shared_memory.byte_size: given 380 bytes; allowed: 384 bytes, as shape [1, 4, 3, 8] of "
     "FP32 takes"},
    {"no stored tensor", [](Request& r, World&) { r.key() = r.stored("x"); }, Code::kNotFound,
     "key.stored: given 'x'; no such tensor is kept: never put here, dropped, or its lease ran "
     "out"},
    {"empty handle", [](Request& r, World&) { r.key() = r.stored(""); }, Code::kInvalidArgument,
     "key.stored: given nothing; allowed: a handle that PutTensor answered"},
    {"priority", [](Request& r, World&) { r.message.priority = 4; }, Code::kInvalidArgument,
     "priority: given 4; allowed: 1 (high), 2 (normal), 3 (low), 0 (normal)"},
    {"bias shape", [](Request& r, World&) { r.bias() = r.tensor({1, 2, 3, 3}); },
     Code::kInvalidArgument,
     "bias.shape: given [1, 2, 3, 3]; allowed: 1 or the full size at each axis of [1, 4, 3, 3]"},
    {"bias rank", [](Request& r, World&) { r.bias() = r.tensor({3, 3}); }, Code::kInvalidArgument,
     "bias.shape: given [3, 3] of rank 2; allowed: rank 4, [1 or B, 1 or H, 1 or Sq, 1 or Sk]"},
    {"key_lengths too long", [](Request& r, World&) { r.key_lengths() = r.lengths({4}); },
     Code::kInvalidArgument, "key_lengths[0]: given 4; allowed: 0..3"},
    {"key_lengths negative", [](Request& r, World&) { r.key_lengths() = r.lengths({-1}); },
     Code::kInvalidArgument, "key_lengths[0]: given -1; allowed: 0..3"},
    {"key_lengths of the second",
     [](Request& r, World&) {
       r.all({2, 4, 3, 8});
       r.key_lengths() = r.lengths({3, -2});
     },
     Code::kInvalidArgument, "key_lengths[1]: given -2; allowed: 0..3"},
    {"key_lengths count", [](Request& r, World&) { r.key_lengths() = r.lengths({1, 1}); },
     Code::kInvalidArgument,
     "key_lengths.shape: given [2]; allowed: 1 at axis 0 (batch B, as the first tensor has)"},
    {"key_lengths dtype", [](Request& r, World&) { r.key_lengths() = r.tensor({1}); },
     Code::kInvalidArgument, "key_lengths.dtype: given FP32; allowed: INT64"},
    {"NaN bias",
     [](Request& r, World&) { r.bias() = r.bias_of<float>(DataType::kFp32, {{4, kNan}}); },
     Code::kInvalidArgument, "bias[0, 0, 1, 1]: given nan; allowed: finite numbers and -infinity"},
    {"infinite bias",
     [](Request& r, World&) { r.bias() = r.bias_of<float>(DataType::kFp32, {{5, kInf}}); },
     Code::kInvalidArgument, "bias[0, 0, 1, 2]: given inf; allowed: finite numbers and -infinity"},
    {"NaN after infinity",
     [](Request& r, World&) {
       r.bias() = r.bias_of<float>(DataType::kFp32, {{2, kInf}, {7, kNan}});
     },
     Code::kInvalidArgument, "bias[0, 0, 2, 1]: given nan; allowed: finite numbers and -infinity"},
    {"negative NaN",
     [](Request& r, World&) { r.bias() = r.bias_of<float>(DataType::kFp32, {{8, -kNan}}); },
     Code::kInvalidArgument, "bias[0, 0, 2, 2]: given nan; allowed: finite numbers and -infinity"},
    {"NaN in FP16",
     [](Request& r, World&) {
       half(r);
       r.bias() = r.bias_of<std::uint16_t>(DataType::kFp16, {{3, 0x7E00}});
     },
     Code::kInvalidArgument, "bias[0, 0, 1, 0]: given nan; allowed: finite numbers and -infinity"},
    {"infinity in FP16",
     [](Request& r, World&) {
       half(r);
       r.bias() = r.bias_of<std::uint16_t>(DataType::kFp16, {{6, 0x7C00}});
     },
     Code::kInvalidArgument, "bias[0, 0, 2, 0]: given inf; allowed: finite numbers and -infinity"},
    {"NaN in BF16",
     [](Request& r, World&) {
       brain(r);
       r.bias() = r.bias_of<std::uint16_t>(DataType::kBf16, {{1, 0xFFC0}});
     },
     Code::kInvalidArgument, "bias[0, 0, 0, 1]: given nan; allowed: finite numbers and -infinity"},
    {"infinity in BF16",
     [](Request& r, World&) {
       brain(r);
       r.bias() = r.bias_of<std::uint16_t>(DataType::kBf16, {{2, 0x7F80}});
     },
     Code::kInvalidArgument, "bias[0, 0, 0, 2]: given inf; allowed: finite numbers and -infinity"},
    {"scale zero", [](Request& r, World&) { r.message.scale = 0.0F; }, Code::kInvalidArgument,
     "scale: given 0.0; allowed: a finite number above 0"},
    {"scale negative", [](Request& r, World&) { r.message.scale = -0.1F; }, Code::kInvalidArgument,
     "scale: given -0.10000000149011612; allowed: a finite number above 0"},
    {"scale NaN", [](Request& r, World&) { r.message.scale = kNan; }, Code::kInvalidArgument,
     "scale: given nan; allowed: a finite number above 0"},
    {"scale infinite", [](Request& r, World&) { r.message.scale = kInf; }, Code::kInvalidArgument,
     "scale: given inf; allowed: a finite number above 0"},
    {"softcap negative", [](Request& r, World&) { r.message.softcap = -1.0F; },
     Code::kInvalidArgument, "softcap: given -1.0; allowed: a finite number, 0 (off) or more"},
    {"softcap off",
     [](Request& r, World&) {
       r.message.model = "capped";
       r.message.softcap = 0.0F;
     },
     Code::kFailedPrecondition,
     "softcap: given 0; model capped was exported with softcap 5.0; allowed: a number above 0, or "
     "another model"},
    {"no softcap for its variant", [](Request& r, World&) { r.message.variant = "softcap"; },
     Code::kInvalidArgument,
     "softcap: given none; allowed: a number above 0 with variant 'softcap'"},
    {"top_k", [](Request& r, World&) { r.message.returns.top_k = 4; }, Code::kInvalidArgument,
     "returns.top_k: given 4; allowed: 0..3, the number of keys"},
    {"mass_by_distance", [](Request& r, World&) { r.message.returns.mass_by_distance = 4; },
     Code::kInvalidArgument,
     "returns.mass_by_distance: given 4; allowed: 0..3, the longest length"},
    {"sinks of another type",
     [](Request& r, World&) {
       r.message.model = "masked";
       r.at(wire::Input::kSinks) = r.lengths({1, 1, 1, 1});
     },
     Code::kInvalidArgument, "sinks.dtype: given INT64; allowed: FP32"},
    {"too few sinks",
     [](Request& r, World&) {
       r.message.model = "masked";
       r.at(wire::Input::kSinks) = r.with<float>({3}, DataType::kFp32, {0, 0, 0});
     },
     Code::kInvalidArgument,
     "sinks.shape: given [3]; allowed: 4 at axis 0 (num_heads of the model)"},
    {"a sink that is no number",
     [](Request& r, World&) {
       r.message.model = "masked";
       r.at(wire::Input::kSinks) = r.with<float>({4}, DataType::kFp32, {0, 0, NAN, 0});
     },
     Code::kInvalidArgument, "sinks[2]: given nan; allowed: finite numbers and -infinity"},
    {"an infinite sink",
     [](Request& r, World&) {
       r.message.model = "masked";
       r.at(wire::Input::kSinks) = r.with<float>({4}, DataType::kFp32, {0, INFINITY, 0, 0});
     },
     Code::kInvalidArgument, "sinks[1]: given inf; allowed: finite numbers and -infinity"},
    {"no sinks",
     [](Request& r, World&) {
       r.at(wire::Input::kSinks) = r.with<float>({4}, DataType::kFp32, {0, 0, 0, 0});
     },
     Code::kFailedPrecondition, "model causal version 1 cannot do this: it takes no sinks"},
    {"no log_sum_exp", [](Request& r, World&) { r.message.returns.log_sum_exp = true; },
     Code::kFailedPrecondition, "model causal version 1 cannot do this: it gives no log_sum_exp"},
    {"nothing wanted", [](Request& r, World&) { r.message.returns.no_output = true; },
     Code::kInvalidArgument, "returns: given nothing to return; allowed: at least one thing"},
    {"variant cannot",
     [](Request& r, World&) {
       r.message.variant = "fused";
       r.message.returns.weights = true;
     },
     Code::kFailedPrecondition,
     "variant 'fused' of model causal version 1 cannot do this: it gives no weights"},
    {"model cannot",
     [](Request& r, World&) {
       r.message.model = "bare";
       r.message.returns.entropy = true;
     },
     Code::kFailedPrecondition, "model bare version 1 cannot do this: it gives no weights"},
    {"model takes no softcap",
     [](Request& r, World&) {
       r.message.model = "bare";
       r.message.softcap = 2.0F;
     },
     Code::kFailedPrecondition, "model bare version 1 cannot do this: it takes no softcap"},
    {"model takes no bias",
     [](Request& r, World&) {
       r.message.model = "bare";
       r.bias() = r.tensor({1, 1, 1, 1});
     },
     Code::kFailedPrecondition, "model bare version 1 cannot do this: it takes no bias"},
    {"hidden states to a core",
     [](Request& r, World&) { r.hidden_states() = r.tensor({1, 3, 32}); }, Code::kInvalidArgument,
     "hidden_states: given a tensor; allowed: query, key, value for model causal"},
    {"query to a layer", [](Request& r, World&) { r.message.model = "self"; },
     Code::kInvalidArgument, "query: given a tensor; allowed: hidden_states for model self"},
    {"query beside hidden states",
     [](Request& r, World&) {
       r.message.model = "cross";
       r.hidden_states() = r.tensor({1, 3, 32});
     },
     Code::kInvalidArgument,
     "query: given a tensor; allowed: hidden_states, context for model cross"},
    {"scale to a layer",
     [](Request& r, World&) {
       layer_of(r, "self");
       r.message.scale = 0.1F;
     },
     Code::kInvalidArgument, "scale: given 0.10000000149011612; allowed: nothing for layer models"},
    {"softcap to a layer",
     [](Request& r, World&) {
       layer_of(r, "self");
       r.message.softcap = 1.5F;
     },
     Code::kInvalidArgument, "softcap: given 1.5; allowed: nothing for layer models"},
    {"layer width",
     [](Request& r, World&) {
       layer_of(r, "self");
       r.hidden_states() = r.tensor({1, 3, 31});
     },
     Code::kInvalidArgument,
     "hidden_states.shape: given [1, 3, 31]; allowed: 32 at axis 2 (embed_dim of the model)"},
    {"no hidden states",
     [](Request& r, World&) {
       layer_of(r, "self");
       r.hidden_states().reset();
     },
     Code::kInvalidArgument, "hidden_states: given nothing; allowed: [B, Sq, E] for layer models"},
    {"no context", [](Request& r, World&) { layer_of(r, "cross"); }, Code::kInvalidArgument,
     "context: given nothing; allowed: [B, Sk, E] for layer models"},
    {"context width",
     [](Request& r, World&) {
       layer_of(r, "cross");
       r.context() = r.tensor({1, 3, 32});
     },
     Code::kInvalidArgument,
     "context.shape: given [1, 3, 32]; allowed: 24 at axis 2 (context_dim of the model)"},
    {"context batch",
     [](Request& r, World&) {
       layer_of(r, "cross");
       r.context() = r.tensor({2, 3, 24});
     },
     Code::kInvalidArgument,
     "context.shape: given [2, 3, 24]; allowed: 1 at axis 0 (batch B, as the first tensor has)"},
    {"context to self-attention",
     [](Request& r, World&) {
       layer_of(r, "self");
       r.context() = r.tensor({1, 3, 32});
     },
     Code::kInvalidArgument, "context: given a tensor; allowed: hidden_states for model self"},
    {"tensors to a transformer", [](Request& r, World&) { r.message.model = "bert"; },
     Code::kFailedPrecondition, "model: bert is a transformer and takes tokens; use AttendTokens"},
    {"query too long", [](Request& r, World&) { r.query() = r.tensor({1, 4, 4097, 8}); },
     Code::kInvalidArgument, "length Sq: given 4097; allowed: 1..4096"},
    {"key too long", [](Request& r, World&) { r.key() = r.value() = r.tensor({1, 4, 4097, 8}); },
     Code::kInvalidArgument, "length Sk: given 4097; allowed: 1..4096"},
    {"too many sequences", [](Request& r, World&) { r.all({65, 4, 1, 8}); }, Code::kInvalidArgument,
     "batch B: given 65; allowed: 1..64"},
    {"request too large", [](Request& r, World&) { r.all({64, 4, 4096, 8}); },
     Code::kResourceExhausted,
     "request size: its tensors take 100663296 bytes; allowed: 33554432 (--max-request-mib)"},
    {"answer too large",
     [](Request& r, World&) {
       r.all({2, 4, 1100, 8});
       r.message.returns.weights = true;
     },
     Code::kResourceExhausted,
     "response size: its tensors take 39001600 bytes; allowed: 16777216 (--max-response-mib)"},
    {"too much memory",
     [](Request& r, World&) {
       r.all({1, 4, 2100, 8});
       r.message.variant = "fused";
     },
     Code::kResourceExhausted,
     "lengths: B=1, H=4, Sq=2100, Sk=2100 would take about 423360000 bytes of working memory with "
     "variant 'fused'; allowed: 402653184 (--max-working-mib)"},
    {"output region without a name", [](Request& r, World&) { r.message.output_region.emplace(); },
     Code::kInvalidArgument,
     "output_region.name: given nothing; allowed: a name that RegisterSharedMemory answered"},
    {"output region unaligned", [](Request& r, World&) { r.message.output_region = {"a", 63, 0}; },
     Code::kInvalidArgument, "output_region.offset: given 63; allowed: a multiple of 64"},
    {"output region too small", [](Request& r, World&) { r.message.output_region = {"a", 0, 383}; },
     Code::kInvalidArgument,
     "output_region.byte_size: given 383; allowed: 384 or more, for this answer"},
    {"output region too small for two",
     [](Request& r, World&) {
       r.message.returns.entropy = true;
       r.message.output_region = {"a", 0, 431};
     },
     Code::kInvalidArgument,
     "output_region.byte_size: given 431; allowed: 432 or more, for this answer"},
    {"stored of another dtype",
     [](Request& r, World& w) { r.key() = r.stored(w.store(DataType::kFp16, {1, 4, 3, 8})); },
     Code::kInvalidArgument, "key.dtype: given FP16; allowed: FP32"},
    {"stored given another dtype",
     [](Request& r, World& w) {
       r.key() = r.stored(w.store(DataType::kFp32, {1, 4, 3, 8}), {}, 2);
     },
     Code::kInvalidArgument, "key.dtype: given FP16; allowed: FP32"},
    {"stored given another shape",
     [](Request& r, World& w) {
       r.key() = r.stored(w.store(DataType::kFp32, {1, 4, 3, 8}), {1, 4, 8, 3});
     },
     Code::kInvalidArgument, "key.shape: given [1, 4, 8, 3]; allowed: [1, 4, 3, 8], as it was put"},
    {"stored of another rank",
     [](Request& r, World& w) { r.key() = r.stored(w.store(DataType::kFp32, {4, 3, 8})); },
     Code::kInvalidArgument,
     "key.shape: given [4, 3, 8] of rank 3; allowed: rank 4, [B, Hkv, Sk, D]"},
    {"stored of another size",
     [](Request& r, World& w) { r.key() = r.stored(w.store(DataType::kFp32, {1, 4, 3, 9})); },
     Code::kInvalidArgument,
     "key.shape: given [1, 4, 3, 9]; allowed: 8 at axis 3 (head_dim of the model)"},
};

TEST_CASE("a bad request is refused: what is wrong, what was given, what is allowed") {
  for (const Refusal& refusal : kRefusals) {
    CAPTURE(refusal.name);
    World world;
    Request request;
    refusal.change(request, world);
    const Status status = status_thrown([&] {
      prepare(plan_attend(request.message, world.context(), kPeer, false), request.elements(),
              world.context(), kPeer);
    });
    CHECK(name_of(status.code) == name_of(refusal.code));
    CHECK(status.message == refusal.message);
    CHECK(status.retry_after.count() == 0);
  }
}

TEST_CASE("endless shapes and names are refused by what a status can hold of them") {
  World world;
  Request request;
  request.query() = request.sized(std::vector<std::int64_t>(1'000'000, 1), 0);
  const Status status =
      status_thrown([&] { plan_attend(request.message, world.context(), kPeer, false); });
  CHECK(status.code == Code::kInvalidArgument);
  CHECK(status.message.starts_with("query.shape: given [1, 1, 1, "));
  CHECK(status.message.size() > 640);
  CHECK(status.message.size() < 10'000);
}

TEST_CASE("without limits no size overflows") {
  Limits limits;
  limits.max_message_bytes = limits.max_request_bytes = limits.max_response_bytes =
      limits.max_working_bytes = std::numeric_limits<std::size_t>::max();
  limits.max_seq_len = limits.max_batch = std::numeric_limits<std::int64_t>::max();
  World world(limits);
  Request request;
  constexpr std::int64_t kLong = std::int64_t{1} << 55;  // of 2^62 bytes
  request.query() = request.key() = request.value() = Request::chunked(1ULL << 62);
  for (auto* tensor : {&request.query(), &request.key(), &request.value()}) {
    (*tensor)->shape = {1, 4, kLong, 8};
  }
  const auto plan = [&] { return plan_attend(request.message, world.context(), kPeer, true); };
  CHECK(plan().request_bytes == 3ULL << 62);

  request.message.returns.weights = true;  // 4 * 2^55 * 2^55 * 4 bytes, and the output
  CHECK(status_thrown(plan).message ==
        "response size: its tensors take 20769187434139315125808003744268288 bytes; allowed: "
        "18446744073709551615 (--max-response-mib)");
}

}  // namespace
}  // namespace attnserve::requests
