// Requests of Decode. Messages and members of the oneof that come twice: as attention_decode.cc.
#include <bit>
#include <cstring>

#include "wire/fields.h"
#include "wire/kv_sessions.h"
#include "wire/tensor_fields.h"

namespace attnserve::wire {

namespace {

constexpr std::uint32_t kLayerUncounted = numbers({15});  // AttendLayer.padding
// A step of 1024 sessions, each with everything that it may have, and more than twice that.
constexpr DecodeLimits kLimits{16384};

template <class T>
void append(const FieldReader& reader, std::vector<T>& to) {
  append_packed(reader, "too many numbers", to);
}

void merge(FieldReader reader, LayerSpec& layer) {
  while (reader.next()) {
    switch (reader.key()) {
      case varint_field(1):
        layer.window = reader.number32();
        break;
      case varint_field(2):
        layer.kept_first = reader.number32();
        break;
      case varint_field(3):
        layer.cross = reader.flag();
        break;
      case varint_field(4):
        layer.latent = reader.flag();
        break;
      case bytes_field(5): {  // packed
        const ByteSpan packed = reader.bytes();
        if (packed.size() % sizeof(float) != 0) {
          reader.decoding().refuse("a packed field ends in the middle of a number");
        }
        const std::size_t before = layer.sinks.size();
        layer.sinks.resize(before + packed.size() / sizeof(float));
        if (!packed.empty()) std::memcpy(&layer.sinks[before], packed.data(), packed.size());
        break;
      }
      case fixed32_field(5):
        layer.sinks.push_back(std::bit_cast<float>(reader.number32()));
        break;
    }
  }
}

void merge(FieldReader reader, ModelOfLayer& layer) {
  while (reader.next()) {
    switch (reader.key()) {
      case bytes_field(1):
        layer.model = reader.text();
        break;
      case bytes_field(2):
        layer.version = reader.text();
        break;
    }
  }
}

void merge(FieldReader reader, NewSession& session) {
  while (reader.next()) {
    switch (reader.key()) {
      case varint_field(1):
        session.max_tokens = reader.number();
        break;
      case varint_field(2):
        session.reserved_tokens = reader.number();
        break;
      case bytes_field(3):
        session.prefix_hashes = reader.bytes();
        break;
      case varint_field(4):
        session.cross_tokens = reader.number();
        break;
    }
  }
}

void merge(FieldReader reader, OpenSessions& open) {
  while (reader.next()) {
    switch (reader.key()) {
      case bytes_field(1):
        open.model = reader.text();
        break;
      case bytes_field(2):
        open.version = reader.text();
        break;
      case varint_field(3):
        open.num_layers = reader.number32();
        break;
      case bytes_field(4):
        merge(reader.message(), open.layers.emplace_back());
        break;
      case varint_field(5):
        open.cache_type = static_cast<std::int32_t>(reader.number32());
        break;
      case varint_field(6):
        open.lease = reader.number();
        break;
      case bytes_field(7):
        merge(reader.message(), open.sessions.emplace_back());
        break;
      case bytes_field(8):
        merge(reader.message(), open.layer_models.emplace_back());
        break;
    }
  }
}

void merge(FieldReader reader, SessionStep& session) {
  while (reader.next()) {
    switch (reader.key()) {
      case bytes_field(1):
        session.session_id = reader.text();
        break;
      case varint_field(2):
        session.new_tokens = reader.number32();
        break;
      case varint_field(3):
        session.parents.push_back(static_cast<std::int32_t>(reader.number32()));
        break;
      case bytes_field(3):
        append(reader, session.parents);
        break;
      case bytes_field(4):
        session.prefix_hashes = reader.bytes();
        break;
      case varint_field(5):
        session.cross_tokens = reader.number32();
        break;
    }
  }
}

void merge(FieldReader reader, BeginStep& step) {
  while (reader.next()) {
    switch (reader.key()) {
      case varint_field(1):
        step.step_id = reader.number();
        break;
      case bytes_field(2):
        merge(reader.message(), step.sessions.emplace_back());
        break;
      case varint_field(3):
        step.priority = reader.number32();
        break;
      case varint_field(4):
        step.queries_only = reader.flag();
        break;
    }
  }
}

void merge(FieldReader reader, LayerReturns& returns) {
  while (reader.next()) {
    switch (reader.key()) {
      case varint_field(1):
        returns.no_output = reader.flag();
        break;
      case varint_field(2):
        returns.log_sum_exp = reader.flag();
        break;
      case varint_field(3):
        returns.entropy = reader.flag();
        break;
      case varint_field(4):
        returns.weights_of.push_back(reader.number32());
        break;
      case bytes_field(4):
        append(reader, returns.weights_of);
        break;
    }
  }
}

void merge(FieldReader reader, AttendLayer& layer) {
  while (reader.next()) {
    switch (reader.key()) {
      case varint_field(1):
        layer.step_id = reader.number();
        break;
      case varint_field(2):
        layer.layer = reader.number32();
        break;
      case bytes_field(3):
        merge(reader.message(), present(layer.query));
        break;
      case bytes_field(4):
        merge(reader.message(), present(layer.key));
        break;
      case bytes_field(5):
        merge(reader.message(), present(layer.value));
        break;
      case bytes_field(6):
        merge(reader.message(), layer.returns);
        break;
      case bytes_field(7):
        merge(reader.message(), present(layer.output_region));
        break;
      case bytes_field(8):
        merge(reader.message(), present(layer.begin));
        break;
      case bytes_field(9):
        merge(reader.message(), present(layer.hidden_states));
        break;
    }
  }
}

void merge(FieldReader reader, AbandonStep& abandon) {
  while (reader.next()) {
    if (reader.key() == varint_field(1)) abandon.step_id = reader.number();
  }
}

void merge(FieldReader reader, CommitTree& commit) {
  while (reader.next()) {
    switch (reader.key()) {
      case bytes_field(1):
        commit.session_id = reader.text();
        break;
      case varint_field(2):
        commit.accepted.push_back(reader.number32());
        break;
      case bytes_field(2):
        append(reader, commit.accepted);
        break;
    }
  }
}

void merge(FieldReader reader, TruncateSession& truncate) {
  while (reader.next()) {
    switch (reader.key()) {
      case bytes_field(1):
        truncate.session_id = reader.text();
        break;
      case varint_field(2):
        truncate.length = reader.number();
        break;
    }
  }
}

void merge(FieldReader reader, ForkSession& fork) {
  while (reader.next()) {
    switch (reader.key()) {
      case bytes_field(1):
        fork.session_id = reader.text();
        break;
      case varint_field(2):
        fork.length = reader.number();
        break;
      case varint_field(3):
        fork.max_tokens = reader.number();
        break;
      case varint_field(4):
        fork.reserved_tokens = reader.number();
        break;
      case varint_field(5):
        fork.lease = reader.number();
        break;
    }
  }
}

void merge(FieldReader reader, RenewSession& renew) {
  while (reader.next()) {
    switch (reader.key()) {
      case bytes_field(1):
        renew.session_id = reader.text();
        break;
      case varint_field(2):
        renew.lease = reader.number();
        break;
    }
  }
}

void merge_id(FieldReader reader, std::string_view& session_id) {
  while (reader.next()) {
    if (reader.key() == bytes_field(1)) session_id = reader.text();
  }
}

void merge(FieldReader reader, CloseSession& close) { merge_id(reader, close.session_id); }

void merge(FieldReader reader, ExportSession& session) { merge_id(reader, session.session_id); }

void merge(FieldReader reader, SessionChunk& chunk) {
  while (reader.next()) {
    switch (reader.key()) {
      case varint_field(1):
        chunk.index = reader.number32();
        break;
      case bytes_field(2):
        chunk.data = reader.bytes();
        break;
      case varint_field(3):
        chunk.last = reader.flag();
        break;
    }
  }
}

void merge(FieldReader reader, ImportSession& session) {
  while (reader.next()) {
    switch (reader.key()) {
      case bytes_field(1):
        merge(reader.message(), session.chunk);
        break;
      case varint_field(2):
        session.max_tokens = reader.number();
        break;
      case varint_field(3):
        session.reserved_tokens = reader.number();
        break;
      case varint_field(4):
        session.lease = reader.number();
        break;
    }
  }
}

void merge(FieldReader reader, MovingSession& session) {
  while (reader.next()) {
    switch (reader.key()) {
      case bytes_field(1):
        session.caller = reader.text();
        break;
      case varint_field(2):
        session.lease = reader.number();
        break;
      case bytes_field(3):
        session.prefix_hashes = reader.bytes();
        break;
    }
  }
}

// The action of a type: what there is of it, if it is the one chosen so far, else a new one.
template <class Action>
Action& chosen(DecodeAction& action) {
  Action* there = std::get_if<Action>(&action);
  return there != nullptr ? *there : action.emplace<Action>();
}

}  // namespace

DecodeRequest decode_decode(ByteSpan message) {
  Decoding decoding("Decode", kLimits);
  DecodeRequest request;
  DecodeAction& action = request.action;
  for (FieldReader reader(message, decoding); reader.next();) {
    switch (reader.key()) {
      case varint_field(1):
        request.request_id = reader.number();
        break;
      case bytes_field(2):
        merge(reader.message(), chosen<OpenSessions>(action));
        break;
      case bytes_field(3):
        merge(reader.message(), chosen<BeginStep>(action));
        break;
      case bytes_field(4):
        merge(reader.message(kLayerUncounted), chosen<AttendLayer>(action));
        break;
      case bytes_field(5):
        merge(reader.message(), chosen<AbandonStep>(action));
        break;
      case bytes_field(6):
        merge(reader.message(), chosen<CommitTree>(action));
        break;
      case bytes_field(7):
        merge(reader.message(), chosen<TruncateSession>(action));
        break;
      case bytes_field(8):
        merge(reader.message(), chosen<ForkSession>(action));
        break;
      case bytes_field(9):
        merge(reader.message(), chosen<RenewSession>(action));
        break;
      case bytes_field(10):
        merge(reader.message(), chosen<CloseSession>(action));
        break;
      case bytes_field(11):
        merge(reader.message(), chosen<ExportSession>(action));
        break;
      case bytes_field(12):
        merge(reader.message(), chosen<ImportSession>(action));
        break;
    }
  }
  return request;
}

MoveSessionRequest decode_move_session(ByteSpan message) {
  Decoding decoding("MoveSession");
  MoveSessionRequest request;
  for (FieldReader reader(message, decoding); reader.next();) {
    switch (reader.key()) {
      case bytes_field(1):
        merge(reader.message(), request.chunk);
        break;
      case bytes_field(2):
        merge(reader.message(), present(request.session));
        break;
    }
  }
  return request;
}

}  // namespace attnserve::wire
