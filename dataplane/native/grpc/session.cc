#include "grpc/session.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>

#include "base/never_destroyed.h"
#include "grpc/stream.h"

namespace attnserve::grpc {

namespace {

// Streams take turns by frames, so a frame is not longer than what others may wait for.
constexpr std::size_t kMostData = 64U << 10;

SessionEvents& events_of(void* user_data) { return *static_cast<SessionEvents*>(user_data); }

Stream* stream_of(nghttp2_session* session, std::int32_t id) {
  return static_cast<Stream*>(nghttp2_session_get_stream_user_data(session, id));
}

std::string_view text_of(const std::uint8_t* text, std::size_t size) {
  return {reinterpret_cast<const char*>(text), size};
}

ByteSpan bytes_of(const std::uint8_t* bytes, std::size_t size) {
  return {reinterpret_cast<const std::byte*>(bytes), size};
}

// Exceptions do not cross nghttp2, which is C: they end the session.
template <class Event>
int guarded(Event event) noexcept {
  try {
    return event();
  } catch (...) {
    return NGHTTP2_ERR_CALLBACK_FAILURE;
  }
}

int on_begin_headers(nghttp2_session*, const nghttp2_frame*, void* user_data) {
  return guarded([&] {
    events_of(user_data).on_headers_begin();
    return 0;
  });
}

int on_header(nghttp2_session*, const nghttp2_frame*, const std::uint8_t* name,
              std::size_t name_size, const std::uint8_t* value, std::size_t value_size,
              std::uint8_t, void* user_data) {
  return guarded([&] {
    const bool go_on =
        events_of(user_data).on_header(text_of(name, name_size), text_of(value, value_size));
    return go_on ? 0 : static_cast<int>(NGHTTP2_ERR_PAUSE);
  });
}

int on_data_chunk(nghttp2_session* session, std::uint8_t, std::int32_t id, const std::uint8_t* data,
                  std::size_t size, void* user_data) {
  return guarded([&] {
    Stream* stream = stream_of(session, id);
    if (stream == nullptr) return nghttp2_session_consume_connection(session, size);
    events_of(user_data).on_data(*stream, bytes_of(data, size));
    return 0;
  });
}

void received_headers(nghttp2_session* session, const nghttp2_frame& frame, SessionEvents& events) {
  events.on_headers_end();
  if (frame.headers.cat == NGHTTP2_HCAT_REQUEST) events.on_request(frame.hd.stream_id);
  if ((frame.hd.flags & NGHTTP2_FLAG_END_STREAM) == 0) return;
  if (Stream* stream = stream_of(session, frame.hd.stream_id)) events.on_half_close(*stream);
}

void received(nghttp2_session* session, const nghttp2_frame& frame, SessionEvents& events) {
  switch (frame.hd.type) {
    case NGHTTP2_HEADERS:
      return received_headers(session, frame, events);
    case NGHTTP2_DATA: {
      if ((frame.hd.flags & NGHTTP2_FLAG_END_STREAM) == 0) return;
      if (Stream* stream = stream_of(session, frame.hd.stream_id)) events.on_half_close(*stream);
      return;
    }
    case NGHTTP2_SETTINGS:
      if ((frame.hd.flags & NGHTTP2_FLAG_ACK) != 0) return events.on_settings_acknowledged();
      return events.on_settings();
    case NGHTTP2_PING: {
      PingData data;
      std::copy_n(frame.ping.opaque_data, data.size(), data.begin());
      return events.on_ping((frame.hd.flags & NGHTTP2_FLAG_ACK) != 0, data);
    }
    case NGHTTP2_RST_STREAM:
      return events.on_reset_received(stream_of(session, frame.hd.stream_id));
    default:
      return;
  }
}

int on_frame_received(nghttp2_session* session, const nghttp2_frame* frame, void* user_data) {
  return guarded([&] {
    received(session, *frame, events_of(user_data));
    return 0;
  });
}

int on_stream_closed(nghttp2_session* session, std::int32_t id, std::uint32_t, void* user_data) {
  return guarded([&] {
    if (Stream* stream = stream_of(session, id)) events_of(user_data).on_closed(*stream);
    return 0;
  });
}

int on_frame_sent(nghttp2_session* session, const nghttp2_frame* frame, void* user_data) {
  return guarded([&] {
    SessionEvents& events = events_of(user_data);
    if (frame->hd.type == NGHTTP2_RST_STREAM) {
      events.on_reset_sent(frame->rst_stream.error_code);
    } else if (frame->hd.type == NGHTTP2_HEADERS) {
      if (Stream* stream = stream_of(session, frame->hd.stream_id)) {
        events.on_headers_sent(*stream, (frame->hd.flags & NGHTTP2_FLAG_END_STREAM) != 0);
      }
    }
    return 0;
  });
}

ssize_t most_data(nghttp2_session*, std::uint8_t, std::int32_t, std::int32_t, std::int32_t,
                  std::uint32_t peers_max_frame_size, void*) {
  return static_cast<ssize_t>(std::min<std::size_t>(peers_max_frame_size, kMostData));
}

ssize_t offer_data(nghttp2_session*, std::int32_t, std::uint8_t*, std::size_t most,
                   std::uint32_t* flags, nghttp2_data_source* source, void* user_data) {
  ssize_t size = 0;
  const int failed = guarded([&] {
    const SessionEvents::Offer offer =
        events_of(user_data).on_data_wanted(*static_cast<Stream*>(source->ptr), most);
    if (offer.size == 0) return static_cast<int>(NGHTTP2_ERR_DEFERRED);
    *flags |= NGHTTP2_DATA_FLAG_NO_COPY;
    if (offer.last) *flags |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
    size = static_cast<ssize_t>(offer.size);
    return 0;
  });
  return failed != 0 ? failed : size;
}

int send_data(nghttp2_session*, nghttp2_frame*, const std::uint8_t* header, std::size_t size,
              nghttp2_data_source* source, void* user_data) {
  constexpr std::size_t kFrameHeader = 9;
  return guarded([&] {
    const bool go_on = events_of(user_data).on_data_frame(*static_cast<Stream*>(source->ptr),
                                                          bytes_of(header, kFrameHeader), size);
    return go_on ? 0 : static_cast<int>(NGHTTP2_ERR_PAUSE);
  });
}

// nghttp2 reports an argument that cannot be as it reports a lack of memory; only that can be here.
void check(int result) {
  if (nghttp2_is_fatal(result) != 0) throw std::bad_alloc();
}

struct Setup {
  Setup() {
    check(nghttp2_session_callbacks_new(&callbacks));
    check(nghttp2_option_new(&options));
    nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, on_begin_headers);
    nghttp2_session_callbacks_set_on_header_callback(callbacks, on_header);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_data_chunk);
    nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, on_frame_received);
    nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_stream_closed);
    nghttp2_session_callbacks_set_on_frame_send_callback(callbacks, on_frame_sent);
    nghttp2_session_callbacks_set_data_source_read_length_callback(callbacks, most_data);
    nghttp2_session_callbacks_set_send_data_callback(callbacks, send_data);
    nghttp2_option_set_no_auto_window_update(options, 1);
#ifdef ATTNSERVE_NGHTTP2_COUNTS_RESETS
    // Resets are counted by Manners, which knows how to say why.
    constexpr std::uint64_t kNoLimit = std::numeric_limits<std::uint32_t>::max();
    nghttp2_option_set_stream_reset_rate_limit(options, kNoLimit, kNoLimit);
#endif
  }

  nghttp2_session_callbacks* callbacks = nullptr;
  nghttp2_option* options = nullptr;
};

// Copied into each session; kept for ever, for sessions are made on threads that may outlive main.
const Setup& setup() {
  static NeverDestroyed<Setup> instance;
  return *instance;
}

}  // namespace

Session::Session(SessionEvents& events, const ConnectionOptions& options) {
  nghttp2_session* session = nullptr;
  if (nghttp2_session_server_new2(&session, setup().callbacks, &events, setup().options) != 0) {
    throw std::bad_alloc();
  }
  session_.reset(session);
  const std::array<nghttp2_settings_entry, 5> settings{{
      {NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, options.max_concurrent_streams},
      {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, options.stream_window},
      {NGHTTP2_SETTINGS_MAX_FRAME_SIZE, options.max_frame_size},
      {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, static_cast<std::uint32_t>(options.max_header_bytes)},
      {NGHTTP2_SETTINGS_NO_RFC7540_PRIORITIES, 1},
  }};
  check(nghttp2_submit_settings(session, NGHTTP2_FLAG_NONE, settings.data(), settings.size()));
  check(nghttp2_session_set_local_window_size(
      session, NGHTTP2_FLAG_NONE, 0, static_cast<std::int32_t>(options.connection_window)));
}

bool Session::receive(ByteSpan bytes) {
  return nghttp2_session_mem_recv(session_.get(),
                                  reinterpret_cast<const std::uint8_t*>(bytes.data()),
                                  bytes.size()) >= 0;
}

bool Session::send(ByteSpan& frame, bool& more) {
  const std::uint8_t* data = nullptr;
  const ssize_t size = nghttp2_session_mem_send(session_.get(), &data);
  if (size < 0) return false;
  frame = bytes_of(data, static_cast<std::size_t>(size));
  more = size > 0;
  return true;
}

void Session::attach(Stream& stream) {
  nghttp2_session_set_stream_user_data(session_.get(), stream.id, &stream);
  // Incremental: answers of one connection share it by turns, whatever the caller's wish.
  const nghttp2_extpri turns{NGHTTP2_EXTPRI_DEFAULT_URGENCY, 1};
  check(nghttp2_session_change_extpri_stream_priority(session_.get(), stream.id, &turns, 1));
}

void Session::submit_headers(Stream& stream, std::span<const nghttp2_nv> fields, bool with_data) {
  nghttp2_data_provider provider{};
  provider.source.ptr = &stream;
  provider.read_callback = offer_data;
  check(nghttp2_submit_response(session_.get(), stream.id, fields.data(), fields.size(),
                                with_data ? &provider : nullptr));
}

void Session::submit_trailers(const Stream& stream, std::span<const nghttp2_nv> fields) {
  check(nghttp2_submit_trailer(session_.get(), stream.id, fields.data(), fields.size()));
}

void Session::resume(const Stream& stream) {
  check(nghttp2_session_resume_data(session_.get(), stream.id));
}

void Session::reset(const Stream& stream, std::uint32_t error_code) {
  check(nghttp2_submit_rst_stream(session_.get(), NGHTTP2_FLAG_NONE, stream.id, error_code));
}

void Session::submit_ping(const PingData& data) {
  check(nghttp2_submit_ping(session_.get(), NGHTTP2_FLAG_NONE, data.data()));
}

void Session::submit_shutdown_notice() { check(nghttp2_submit_shutdown_notice(session_.get())); }

void Session::submit_goaway(std::uint32_t error_code, std::string_view why) {
  check(nghttp2_submit_goaway(session_.get(), NGHTTP2_FLAG_NONE,
                              nghttp2_session_get_last_proc_stream_id(session_.get()), error_code,
                              reinterpret_cast<const std::uint8_t*>(why.data()), why.size()));
}

void Session::set_initial_window(std::uint32_t size) {
  const nghttp2_settings_entry setting{NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, size};
  check(nghttp2_submit_settings(session_.get(), NGHTTP2_FLAG_NONE, &setting, 1));
}

void Session::open_window(const Stream& stream, std::uint32_t size) {
  check(nghttp2_session_set_local_window_size(session_.get(), NGHTTP2_FLAG_NONE, stream.id,
                                              static_cast<std::int32_t>(size)));
}

void Session::consume_connection(std::size_t size) {
  check(nghttp2_session_consume_connection(session_.get(), size));
}

void Session::consume_stream(const Stream& stream, std::size_t size) {
  check(nghttp2_session_consume_stream(session_.get(), stream.id, size));
}

bool Session::blocked_by_peer(const Stream& stream) const {
  return nghttp2_session_get_remote_window_size(session_.get()) <= 0 ||
         nghttp2_session_get_stream_remote_window_size(session_.get(), stream.id) <= 0;
}

}  // namespace attnserve::grpc
