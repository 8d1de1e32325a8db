// What the tests of grpc/ share: a caller on nghttp2, and a service that notes what it is told.
#pragma once

#include <doctest/doctest.h>
#include <nghttp2/nghttp2.h>
#include <zlib.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/memory.h"
#include "grpc/call.h"
#include "grpc/connection.h"

namespace attnserve::grpc::test {

using Fields = std::vector<std::pair<std::string, std::string>>;

std::string framed(std::string_view message, bool compressed = false);  // with its prefix
std::string deflated(std::string_view message, bool gzip);
std::string text_of(const Bytes& bytes);
OutMessage message_of(std::string_view text);
ByteSpan bytes_of(std::string_view text);

// What a caller knows of one of its calls.
struct Exchange {
  Fields headers;   // the first block
  Fields trailers;  // the second; empty for trailers-only
  std::string data;
  bool ended = false;   // END_STREAM has come
  bool closed = false;  // the stream is gone
  std::uint32_t error = 0;

  std::string field(std::string_view name) const;  // out of either block
  std::string status() const { return field("grpc-status"); }
  std::vector<std::string> messages() const;
};

struct CallerOptions {
  bool reads = true;                // gives window back for what it receives
  std::uint32_t window = 1U << 20;  // of each stream
};

class Caller {
 public:
  explicit Caller(CallerOptions options = {});
  ~Caller() { nghttp2_session_del(session_); }
  Caller(const Caller&) = delete;

  // Opens a call; `body` null: none follows, the stream stays open for `write`.
  std::int32_t call(std::string_view path, const std::string* body = nullptr,
                    const Fields& more = {}, std::string_view method = "POST",
                    std::string_view content_type = "application/grpc");
  void write(std::int32_t id, std::string_view bytes, bool end = false);
  void reset(std::int32_t id);
  void ping();
  void settings();
  void read_all(std::int32_t id);  // gives the window back that `reads` withheld
  Exchange& exchange(std::int32_t id) { return exchanges_[id]; }

  std::string outgoing();                // all that it has to say
  void receive(std::string_view bytes);  // from the server
  nghttp2_session* session() { return session_; }

  std::vector<std::pair<std::uint32_t, std::string>> goaways;  // error code and debug data
  std::vector<std::int32_t> last_stream_ids;                   // of those
  std::size_t pongs = 0;
  std::size_t pings = 0;  // of the server's

 private:
  friend struct CallerEvents;
  struct Upload {
    std::string bytes;
    std::size_t sent = 0;
    bool end = false;
  };

  CallerOptions options_;
  nghttp2_session* session_ = nullptr;
  std::map<std::int32_t, Exchange> exchanges_;
  std::map<std::int32_t, Upload> uploads_;
};

// Notes events; what it does at each can be replaced.
struct Recorder : CallHandler {
  using Log = std::vector<std::string>;

  Recorder(std::shared_ptr<Call> a_call, Log& a_log) : call(std::move(a_call)), log(a_log) {}
  ~Recorder() override { log.push_back("destroyed"); }

  void on_message(Bytes message) override {
    log.push_back("message " + text_of(message));
    if (message_hook) message_hook(*call, std::move(message));
  }
  void on_half_close() override {
    log.push_back("half close");
    if (half_close_hook) half_close_hook(*call);
  }
  void on_all_sent() override {
    log.push_back("all sent");
    if (all_sent_hook) all_sent_hook(*call);
  }
  TimePoint due() const override { return next; }
  void on_due(TimePoint now) override {
    log.push_back("due");
    next = kNever;
    if (due_hook) due_hook(*call, now);
  }
  void on_held(Duration held) override {
    if (next != kNever) next += held;
  }
  void on_end(Code reason) override {
    log.push_back("end " + std::string(name_of(reason)));
    if (end_hook) end_hook(*call, reason);
  }

  std::shared_ptr<Call> call;
  Log& log;
  TimePoint next = kNever;
  std::function<void(Call&, Bytes)> message_hook;
  std::function<void(Call&)> half_close_hook;
  std::function<void(Call&)> all_sent_hook;
  std::function<void(Call&, TimePoint)> due_hook;
  std::function<void(Call&, Code)> end_hook;
};

// "/echo" sends each message back and finishes at half close; "/silent" does nothing; "/refused" is
// refused with RESOURCE_EXHAUSTED and a time to retry after; others are UNIMPLEMENTED.
struct TestService : Service {
  std::variant<Reception, Status> accept(std::shared_ptr<Call> call) override;
  void after_events() override { ++rounds; }
  bool wants_bodies() override { return wants; }
  bool begins_unknown() override { return unknown; }
  bool rechecks() override { return static_cast<bool>(again); }
  std::optional<Status> recheck(const CallInfo& info, bool trusted) override {
    return again(info, trusted);
  }
  void count(std::string_view path, Code code) override {
    counted.emplace_back(std::string(path), code);
  }

  std::size_t max_message_bytes = 4U << 20;
  std::function<void(Recorder&)> prepare;  // of each handler, before it is used
  std::vector<std::shared_ptr<Call>> calls;
  Recorder::Log log;
  std::vector<std::pair<std::string, Code>> counted;
  std::size_t rounds = 0;
  bool wants = true;                                                  // bodies
  bool unknown = false;                                               // are callers at first
  std::function<std::optional<Status>(const CallInfo&, bool)> again;  // rechecks
};

struct CountingWaker : Waker {
  void wake(Connection&) override { ++wakes; }
  std::atomic<int> wakes{0};
};

// A connection between a caller and a service, at a time that the test sets.
struct Harness {
  explicit Harness(ConnectionOptions options = {}, CallerOptions caller_options = {},
                   std::size_t budget_bytes = 64U << 20);

  void pump(std::size_t chunk = std::size_t{1} << 20);  // both ways till both are quiet
  bool pump_to_server(std::size_t chunk = std::size_t{1} << 20);
  bool pump_to_caller(std::size_t most = std::size_t{1} << 30);  // what a socket would take
  void connect(ConnectionOptions options);                       // anew
  void at(Duration since_start);  // time passes; timers run as a loop would run them
  void hang_up() { connection.reset(); }

  TimePoint start{std::chrono::hours(1)};
  TimePoint now = start;
  ByteBudget budget;
  TestService service;
  CountingWaker waker;
  Caller caller;
  std::unique_ptr<Connection> connection;
};

// ---- Definitions

namespace detail {

inline nghttp2_nv nv(std::string_view name, std::string_view value) {
  return {reinterpret_cast<std::uint8_t*>(const_cast<char*>(name.data())),
          reinterpret_cast<std::uint8_t*>(const_cast<char*>(value.data())), name.size(),
          value.size(), NGHTTP2_NV_FLAG_NONE};
}

}  // namespace detail

inline std::string framed(std::string_view message, bool compressed) {
  std::string all(1, compressed ? '\1' : '\0');
  for (int shift = 24; shift >= 0; shift -= 8) all += static_cast<char>(message.size() >> shift);
  return all.append(message);
}

inline std::string deflated(std::string_view message, bool gzip) {
  z_stream stream{};
  REQUIRE(deflateInit2(&stream, 6, Z_DEFLATED, gzip ? 31 : 15, 8, Z_DEFAULT_STRATEGY) == Z_OK);
  std::string out(deflateBound(&stream, message.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(message.data()));
  stream.avail_in = static_cast<uInt>(message.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  REQUIRE(deflate(&stream, Z_FINISH) == Z_STREAM_END);
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}

inline std::string text_of(const Bytes& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

inline ByteSpan bytes_of(std::string_view text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

inline OutMessage message_of(std::string_view text) {
  auto owner = std::make_shared<const std::string>(text);
  OutMessage message;
  message.pieces.push_back({owner, bytes_of(*owner)});
  return message;
}

inline std::string Exchange::field(std::string_view name) const {
  for (const Fields* fields : {&headers, &trailers}) {
    for (const auto& [key, value] : *fields) {
      if (key == name) return value;
    }
  }
  return {};
}

inline std::vector<std::string> Exchange::messages() const {
  std::vector<std::string> all;
  std::string_view rest = data;
  while (rest.size() >= 5) {
    std::size_t size = 0;
    for (int i = 1; i < 5; ++i) size = size << 8U | static_cast<unsigned char>(rest[i]);
    if (rest.size() < 5 + size) break;
    all.emplace_back(rest.substr(5, size));
    rest.remove_prefix(5 + size);
  }
  return all;
}

struct CallerEvents {
  static int header(nghttp2_session*, const nghttp2_frame* frame, const std::uint8_t* name,
                    std::size_t name_size, const std::uint8_t* value, std::size_t value_size,
                    std::uint8_t, void* user_data) {
    Exchange& exchange = of(user_data).exchanges_[frame->hd.stream_id];
    Fields& fields =
        frame->headers.cat == NGHTTP2_HCAT_RESPONSE ? exchange.headers : exchange.trailers;
    fields.emplace_back(std::string(reinterpret_cast<const char*>(name), name_size),
                        std::string(reinterpret_cast<const char*>(value), value_size));
    return 0;
  }

  static int data(nghttp2_session* session, std::uint8_t, std::int32_t id,
                  const std::uint8_t* bytes, std::size_t size, void* user_data) {
    Caller& caller = of(user_data);
    caller.exchanges_[id].data.append(reinterpret_cast<const char*>(bytes), size);
    if (caller.options_.reads) nghttp2_session_consume(session, id, size);
    return 0;
  }

  static int frame(nghttp2_session*, const nghttp2_frame* frame, void* user_data) {
    Caller& caller = of(user_data);
    const bool ack = (frame->hd.flags & NGHTTP2_FLAG_ACK) != 0;
    if (frame->hd.type == NGHTTP2_PING) ++(ack ? caller.pongs : caller.pings);
    if (frame->hd.type == NGHTTP2_GOAWAY) {
      caller.goaways.emplace_back(
          frame->goaway.error_code,
          std::string(reinterpret_cast<const char*>(frame->goaway.opaque_data),
                      frame->goaway.opaque_data_len));
      caller.last_stream_ids.push_back(frame->goaway.last_stream_id);
    }
    if ((frame->hd.type == NGHTTP2_DATA || frame->hd.type == NGHTTP2_HEADERS) &&
        (frame->hd.flags & NGHTTP2_FLAG_END_STREAM) != 0) {
      caller.exchanges_[frame->hd.stream_id].ended = true;
    }
    return 0;
  }

  static int closed(nghttp2_session*, std::int32_t id, std::uint32_t error, void* user_data) {
    Exchange& exchange = of(user_data).exchanges_[id];
    exchange.closed = true;
    exchange.error = error;
    return 0;
  }

  static ssize_t upload(nghttp2_session*, std::int32_t id, std::uint8_t* buffer, std::size_t most,
                        std::uint32_t* flags, nghttp2_data_source*, void* user_data) {
    Caller::Upload& upload = of(user_data).uploads_[id];
    const std::size_t size = std::min(most, upload.bytes.size() - upload.sent);
    if (size == 0 && !upload.end) return NGHTTP2_ERR_DEFERRED;
    std::memcpy(buffer, upload.bytes.data() + upload.sent, size);
    upload.sent += size;
    if (upload.end && upload.sent == upload.bytes.size()) *flags |= NGHTTP2_DATA_FLAG_EOF;
    return static_cast<ssize_t>(size);
  }

  static Caller& of(void* user_data) { return *static_cast<Caller*>(user_data); }
};

inline Caller::Caller(CallerOptions options) : options_(options) {
  nghttp2_session_callbacks* callbacks = nullptr;
  nghttp2_session_callbacks_new(&callbacks);
  nghttp2_session_callbacks_set_on_header_callback(callbacks, CallerEvents::header);
  nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, CallerEvents::data);
  nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, CallerEvents::frame);
  nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, CallerEvents::closed);
  nghttp2_option* option = nullptr;
  nghttp2_option_new(&option);
  nghttp2_option_set_no_auto_window_update(option, 1);
  nghttp2_option_set_peer_max_concurrent_streams(option, 100000);
  nghttp2_option_set_max_send_header_block_length(option, 1U << 20);
  nghttp2_session_client_new2(&session_, callbacks, this, option);
  nghttp2_option_del(option);
  nghttp2_session_callbacks_del(callbacks);
  const nghttp2_settings_entry settings[] = {
      {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, options.window}};
  nghttp2_submit_settings(session_, NGHTTP2_FLAG_NONE, settings, 1);
  nghttp2_session_set_local_window_size(session_, NGHTTP2_FLAG_NONE, 0, 1 << 24);
}

inline std::int32_t Caller::call(std::string_view path, const std::string* body, const Fields& more,
                                 std::string_view method, std::string_view content_type) {
  std::vector<nghttp2_nv> fields{detail::nv(":method", method),
                                 detail::nv(":scheme", "http"),
                                 detail::nv(":path", path),
                                 detail::nv(":authority", "here"),
                                 detail::nv("content-type", content_type),
                                 detail::nv("te", "trailers")};
  for (const auto& [name, value] : more) fields.push_back(detail::nv(name, value));
  nghttp2_data_provider provider{};
  provider.read_callback = CallerEvents::upload;
  const std::int32_t id =
      nghttp2_submit_request(session_, nullptr, fields.data(), fields.size(), &provider, nullptr);
  REQUIRE(id > 0);
  uploads_[id] = {body ? *body : std::string(), 0, body != nullptr};
  return id;
}

inline void Caller::write(std::int32_t id, std::string_view bytes, bool end) {
  uploads_[id].bytes.append(bytes);
  uploads_[id].end = end;
  nghttp2_session_resume_data(session_, id);
}

inline void Caller::reset(std::int32_t id) {
  nghttp2_submit_rst_stream(session_, NGHTTP2_FLAG_NONE, id, NGHTTP2_CANCEL);
}

inline void Caller::ping() { nghttp2_submit_ping(session_, NGHTTP2_FLAG_NONE, nullptr); }

inline void Caller::settings() { nghttp2_submit_settings(session_, NGHTTP2_FLAG_NONE, nullptr, 0); }

inline void Caller::read_all(std::int32_t id) {
  const std::int32_t held = nghttp2_session_get_stream_effective_recv_data_length(session_, id);
  nghttp2_session_consume(session_, id, static_cast<std::size_t>(std::max(held, 0)));
}

inline std::string Caller::outgoing() {
  std::string all;
  const std::uint8_t* data = nullptr;
  for (;;) {
    const ssize_t size = nghttp2_session_mem_send(session_, &data);
    if (size <= 0) return all;
    all.append(reinterpret_cast<const char*>(data), static_cast<std::size_t>(size));
  }
}

inline void Caller::receive(std::string_view bytes) {
  nghttp2_session_mem_recv(session_, reinterpret_cast<const std::uint8_t*>(bytes.data()),
                           bytes.size());
}

inline std::variant<Reception, Status> TestService::accept(std::shared_ptr<Call> call) {
  const std::string& path = call->info().path;
  if (path == "/refused") {
    return Status{Code::kResourceExhausted, "full", std::chrono::milliseconds(1500)};
  }
  if (path != "/echo" && path != "/silent") {
    return Status{Code::kUnimplemented, "method: given " + path, {}};
  }
  calls.push_back(call);
  auto handler = std::make_unique<Recorder>(call, log);
  if (path == "/echo") {
    handler->message_hook = [](Call& of, Bytes message) {
      of.send(OutMessage::of(std::move(message)));
    };
    handler->half_close_hook = [](Call& of) { of.finish({}); };
  }
  if (prepare) prepare(*handler);
  return Reception{std::move(handler), max_message_bytes};
}

inline Harness::Harness(ConnectionOptions options, CallerOptions caller_options,
                        std::size_t budget_bytes)
    : budget(budget_bytes), caller(caller_options) {
  connect(options);
}

inline void Harness::connect(ConnectionOptions options) {
  connection = Connection::create(service, budget, waker, options, 7, "ipv4:127.0.0.1:4242", now);
}

inline void Harness::pump(std::size_t chunk) {
  bool moved = true;
  while (moved) {
    moved = pump_to_server(chunk);
    moved = pump_to_caller() || moved;
  }
}

inline bool Harness::pump_to_server(std::size_t chunk) {
  const std::string bytes = caller.outgoing();
  for (std::size_t at = 0; at < bytes.size(); at += chunk) {
    connection->receive(bytes_of(std::string_view(bytes).substr(at, chunk)), now);
  }
  return !bytes.empty();
}

inline bool Harness::pump_to_caller(std::size_t most) {
  bool moved = false;
  std::array<iovec, 16> parts;
  while (most > 0) {
    const std::size_t count = connection->output(parts);
    if (count == 0) break;
    std::string bytes;
    for (std::size_t i = 0; i < count; ++i) {
      bytes.append(static_cast<const char*>(parts[i].iov_base), parts[i].iov_len);
    }
    bytes.resize(std::min(bytes.size(), most));
    most -= bytes.size();
    connection->written(bytes.size(), now);
    caller.receive(bytes);
    moved = true;
  }
  return moved;
}

inline void Harness::at(Duration since_start) {
  const TimePoint goal = start + since_start;
  while (connection->next_timer() <= goal) {
    now = std::max(now, connection->next_timer());
    connection->on_timer(now);
    pump_to_caller();
  }
  now = goal;
}

}  // namespace attnserve::grpc::test
