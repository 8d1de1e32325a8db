#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <string>

#include "wire/kv_sessions.h"
#include "wire_same.h"
#include "wire_support.h"

namespace attnserve::wire::tests {

namespace {

using tests::same;

template <class Ours, class Theirs>
bool same_list(const Ours& ours, const Theirs& theirs) {
  return std::equal(ours.begin(), ours.end(), theirs.begin(), theirs.end());
}

template <class T>
bool same_number(const std::optional<T>& ours, bool there, T theirs) {
  return ours.has_value() == there && ours.value_or(0) == theirs;
}

bool same(const LayerSpec& ours, const pb::LayerSpec& theirs) {
  return same_number(ours.window, theirs.has_window(), theirs.window()) &&
         ours.kept_first == theirs.kept_first() && ours.cross == theirs.cross() &&
         ours.latent == theirs.latent() &&
         std::ranges::equal(ours.sinks, theirs.sinks(), [](float one, float another) {
           return std::bit_cast<std::uint32_t>(one) == std::bit_cast<std::uint32_t>(another);
         });
}

bool same(const ModelOfLayer& ours, const pb::ModelOfLayer& theirs) {
  return ours.model == theirs.model() && ours.version == theirs.version();
}

bool same(const NewSession& ours, const pb::NewSession& theirs) {
  return ours.max_tokens == theirs.max_tokens() &&
         ours.reserved_tokens == theirs.reserved_tokens() &&
         text_of(ours.prefix_hashes) == theirs.prefix_hashes() &&
         ours.cross_tokens == theirs.cross_tokens();
}

bool same(const SessionStep& ours, const pb::SessionStep& theirs) {
  return ours.session_id == theirs.session_id() && ours.new_tokens == theirs.new_tokens() &&
         same_list(ours.parents, theirs.parents()) &&
         text_of(ours.prefix_hashes) == theirs.prefix_hashes() &&
         ours.cross_tokens == theirs.cross_tokens();
}

template <class Ours, class Theirs>
bool same_each(const Ours& ours, const Theirs& theirs) {
  return std::equal(ours.begin(), ours.end(), theirs.begin(), theirs.end(),
                    [](const auto& one, const auto& other) { return same(one, other); });
}

bool same(const OpenSessions& ours, const pb::OpenSessions& theirs) {
  return ours.model == theirs.model() && ours.version == theirs.version() &&
         ours.num_layers == theirs.num_layers() && same_each(ours.layers, theirs.layers()) &&
         ours.cache_type == theirs.cache_type() && ours.lease == theirs.lease() &&
         same_each(ours.sessions, theirs.sessions()) &&
         same_each(ours.layer_models, theirs.layer_models());
}

bool same(const BeginStep& ours, const pb::BeginStep& theirs) {
  return ours.step_id == theirs.step_id() && same_each(ours.sessions, theirs.sessions()) &&
         ours.priority == theirs.priority() && ours.queries_only == theirs.queries_only();
}

bool same(const AttendLayer& ours, const pb::AttendLayer& theirs) {
  return ours.step_id == theirs.step_id() && ours.layer == theirs.layer() &&
         same(ours.query, theirs.has_query(), theirs.query()) &&
         same(ours.key, theirs.has_key(), theirs.key()) &&
         same(ours.value, theirs.has_value(), theirs.value()) &&
         same(ours.hidden_states, theirs.has_hidden_states(), theirs.hidden_states()) &&
         ours.begin.has_value() == theirs.has_begin() &&
         same(ours.begin.value_or(BeginStep{}), theirs.begin()) &&
         ours.returns.no_output == theirs.returns().no_output() &&
         ours.returns.log_sum_exp == theirs.returns().log_sum_exp() &&
         ours.returns.entropy == theirs.returns().entropy() &&
         same_list(ours.returns.weights_of, theirs.returns().weights_of()) &&
         same(ours.output_region, theirs.has_output_region(), theirs.output_region());
}

bool same(const CommitTree& ours, const pb::CommitTree& theirs) {
  return ours.session_id == theirs.session_id() && same_list(ours.accepted, theirs.accepted());
}

bool same(const TruncateSession& ours, const pb::TruncateSession& theirs) {
  return ours.session_id == theirs.session_id() && ours.length == theirs.length();
}

bool same(const ForkSession& ours, const pb::ForkSession& theirs) {
  return ours.session_id == theirs.session_id() &&
         same_number(ours.length, theirs.has_length(), theirs.length()) &&
         ours.max_tokens == theirs.max_tokens() &&
         ours.reserved_tokens == theirs.reserved_tokens() && ours.lease == theirs.lease();
}

bool same(const ImportSession& ours, const pb::ImportSession& theirs) {
  return ours.chunk.index == theirs.chunk().index() &&
         text_of(ours.chunk.data) == theirs.chunk().data() &&
         ours.chunk.last == theirs.chunk().last() && ours.max_tokens == theirs.max_tokens() &&
         ours.reserved_tokens == theirs.reserved_tokens() && ours.lease == theirs.lease();
}

// The action as `Ours`, which fails where it is another one.
template <class Ours, class Theirs>
bool same_action(const DecodeAction& action, const Theirs& theirs) {
  const Ours* ours = std::get_if<Ours>(&action);
  return ours != nullptr && same(*ours, theirs);
}

template <class Ours, class Theirs>
bool same_id(const DecodeAction& action, const Theirs& theirs) {
  const Ours* ours = std::get_if<Ours>(&action);
  return ours != nullptr && ours->session_id == theirs.session_id();
}

bool same(const DecodeRequest& ours, const pb::DecodeRequest& theirs) {
  if (ours.request_id != theirs.request_id()) return false;
  const DecodeAction& action = ours.action;
  switch (theirs.action_case()) {
    case pb::DecodeRequest::kOpen:
      return same_action<OpenSessions>(action, theirs.open());
    case pb::DecodeRequest::kBeginStep:
      return same_action<BeginStep>(action, theirs.begin_step());
    case pb::DecodeRequest::kAttendLayer:
      return same_action<AttendLayer>(action, theirs.attend_layer());
    case pb::DecodeRequest::kAbandonStep: {
      const auto* abandon = std::get_if<AbandonStep>(&action);
      return abandon != nullptr && abandon->step_id == theirs.abandon_step().step_id();
    }
    case pb::DecodeRequest::kCommit:
      return same_action<CommitTree>(action, theirs.commit());
    case pb::DecodeRequest::kTruncate:
      return same_action<TruncateSession>(action, theirs.truncate());
    case pb::DecodeRequest::kFork:
      return same_action<ForkSession>(action, theirs.fork());
    case pb::DecodeRequest::kRenew: {
      const auto* renew = std::get_if<RenewSession>(&action);
      return renew != nullptr && renew->lease == theirs.renew().lease() &&
             same_id<RenewSession>(action, theirs.renew());
    }
    case pb::DecodeRequest::kClose:
      return same_id<CloseSession>(action, theirs.close());
    case pb::DecodeRequest::kExportSession:
      return same_id<ExportSession>(action, theirs.export_session());
    case pb::DecodeRequest::kImportSession:
      return same_action<ImportSession>(action, theirs.import_session());
    default:
      return std::holds_alternative<std::monostate>(action);
  }
}

bool same_decoded(ByteSpan message, const pb::DecodeRequest& theirs) {
  return same(decode_decode(message), theirs);
}

std::string refusal_of(const std::string& message) {
  return refusal([&] { decode_decode(bytes_of(message)); });
}

}  // namespace

TEST_CASE("requests of Decode are read as protobuf reads them, or refused as it refuses them") {
  compare_many<pb::DecodeRequest>(11, 60000, same_decoded);
}

TEST_CASE("each action of Decode is read as protobuf reads it") {
  const auto& request = *pb::DecodeRequest::descriptor();
  std::uint64_t seed = 20;
  for (int index = 0; index < request.field_count(); ++index) {
    const auto& field = *request.field(index);
    if (field.message_type() == nullptr) continue;
    const auto number = static_cast<std::uint32_t>(field.number());
    CAPTURE(field.name());
    compare_many<pb::DecodeRequest>(++seed, 5000, same_decoded, *field.message_type(), {number});
  }
}

TEST_CASE("elements, hashes and chunks are views into the message") {
  pb::DecodeRequest request;
  request.mutable_attend_layer()->mutable_query()->set_data("elements");
  const auto is_view = [](const std::string& message, ByteSpan view) {
    const ByteSpan whole = bytes_of(message);
    return view.data() > whole.data() && view.data() + view.size() <= whole.data() + whole.size();
  };
  std::string message = request.SerializeAsString();
  CHECK(
      is_view(message, std::get<AttendLayer>(decode_decode(bytes_of(message)).action).query->data));
  request.mutable_attend_layer()->mutable_hidden_states()->set_data("elements");
  request.mutable_attend_layer()->mutable_begin()->add_sessions()->set_session_id("id");
  message = request.SerializeAsString();
  const auto layer = std::get<AttendLayer>(decode_decode(bytes_of(message)).action);
  CHECK(is_view(message, layer.hidden_states->data));
  CHECK(is_view(message, bytes_of(layer.begin->sessions.at(0).session_id)));
  request.mutable_begin_step()->add_sessions()->set_prefix_hashes(std::string(32, 'h'));
  message = request.SerializeAsString();
  const auto step = std::get<BeginStep>(decode_decode(bytes_of(message)).action);
  CHECK(is_view(message, step.sessions.at(0).prefix_hashes));
  request.mutable_import_session()->mutable_chunk()->set_data("pages");
  message = request.SerializeAsString();
  CHECK(is_view(message,
                std::get<ImportSession>(decode_decode(bytes_of(message)).action).chunk.data));
}

TEST_CASE("an action is merged with an earlier one of its kind, and replaces one of another") {
  pb::DecodeRequest close, first, second;
  close.mutable_close()->set_session_id("old");
  first.mutable_attend_layer()->set_step_id(3);
  first.mutable_attend_layer()->mutable_query()->add_shape(1);
  second.mutable_attend_layer()->set_layer(4);
  second.mutable_attend_layer()->mutable_query()->add_shape(2);
  const auto three = [&](const pb::DecodeRequest& one, const pb::DecodeRequest& two,
                         const pb::DecodeRequest& last) {
    return one.SerializeAsString() + two.SerializeAsString() + last.SerializeAsString();
  };
  std::string message = three(close, first, second);
  const auto layer = std::get<AttendLayer>(decode_decode(bytes_of(message)).action);
  CHECK(layer.step_id == 3);
  CHECK(layer.layer == 4);
  CHECK(layer.query->shape == std::vector<std::int64_t>{1, 2});
  message = three(first, close, second);
  CHECK(std::get<AttendLayer>(decode_decode(bytes_of(message)).action).step_id == 0);
}

TEST_CASE("a step of a thousand sessions is taken, and what is far beyond is refused at once") {
  pb::DecodeRequest request;
  for (int index = 0; index < 1024; ++index) {
    pb::SessionStep& session = *request.mutable_begin_step()->add_sessions();
    session.set_session_id("a session's id");
    session.set_new_tokens(16);
    for (int token = 0; token < 16; ++token) session.add_parents(token - 1);
    session.set_prefix_hashes(std::string(32, 'h'));
    session.set_cross_tokens(1);
  }
  const std::string message = request.SerializeAsString();
  CHECK(std::get<BeginStep>(decode_decode(bytes_of(message)).action).sessions.size() == 1024);

  for (const std::string& part : {field(3, field(2, "")), std::string("\xf8\x07\0", 3)}) {
    std::string why;
    check_ends_early(part, [&](const std::string& large) { why = refusal_of(large); });
    CHECK(why.find("of Decode (more than 16384 fields)") != std::string::npos);
  }
  // However they are spread over its lists.
  const std::string parents = field(2, field(3, std::string(1 << 17, '\1')));
  CHECK(refusal_of(field(3, parents + parents)) == "");
  CHECK(refusal_of(field(3, parents + parents + parents)).find("(too many numbers)") !=
        std::string::npos);
}

TEST_CASE("requests of MoveSession are read as protobuf reads them") {
  pb::MoveSessionRequest sent;
  sent.mutable_chunk()->set_index(3);
  sent.mutable_chunk()->set_data("bytes");
  sent.mutable_chunk()->set_last(true);
  const auto read = [&](const std::string& bytes) {
    return decode_move_session(std::as_bytes(std::span(bytes)));
  };
  const std::string without = sent.SerializeAsString();
  CHECK(read(without).chunk.index == 3);
  CHECK(text_of(read(without).chunk.data) == "bytes");
  CHECK(read(without).chunk.last);
  CHECK_FALSE(read(without).session);
  sent.mutable_session()->set_caller("@me");
  sent.mutable_session()->set_lease(7);
  sent.mutable_session()->set_prefix_hashes(std::string(32, 'h'));
  const std::string bytes = sent.SerializeAsString();
  const MoveSessionRequest whole = read(bytes);
  REQUIRE(whole.session);
  CHECK(whole.session->caller == "@me");
  CHECK(whole.session->lease == 7);
  CHECK(text_of(whole.session->prefix_hashes) == std::string(32, 'h'));
  CHECK_THROWS_AS(read(bytes.substr(0, bytes.size() - 1)), RequestError);
}

TEST_CASE("padding of a layer does not count") {
  const std::string padding = repeated(field(15, std::string(62, '\0')), kLarge);
  const std::string message = field(4, padding + field(3, ""));
  CHECK(std::get<AttendLayer>(decode_decode(bytes_of(message)).action).query.has_value());
}

}  // namespace attnserve::wire::tests
