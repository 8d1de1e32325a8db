// nghttp2's server session with what gRPC needs of it, as C++.
#pragma once

#include <nghttp2/nghttp2.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "base/memory.h"
#include "grpc/connection.h"

namespace attnserve::grpc {

class Stream;

using PingData = std::array<std::uint8_t, 8>;

// What came, and what may go. Called from within `receive` and `send` alone; whatever is thrown
// ends that call with an error, after which the session is of no more use.
class SessionEvents {
 public:
  virtual ~SessionEvents() = default;

  virtual void on_settings() = 0;
  virtual void on_settings_acknowledged() = 0;
  virtual void on_ping(bool is_answer, const PingData& data) = 0;
  virtual void on_reset_received(Stream* stream) = 0;  // before on_closed; nullptr: none was open
  virtual void on_headers_begin() = 0;                 // of a request, or trailers
  virtual bool on_header(std::string_view name, std::string_view value) = 0;  // false: stop reading
  virtual void on_headers_end() = 0;
  virtual void on_request(std::int32_t stream_id) = 0;  // its headers are whole
  virtual void on_data(Stream& stream, ByteSpan bytes) = 0;
  virtual void on_half_close(Stream& stream) = 0;
  virtual void on_closed(Stream& stream) = 0;

  // What a DATA frame of at most `most` bytes is to carry.
  struct Offer {
    std::size_t size = 0;  // 0: nothing now, `resume` follows
    bool last = false;     // trailers have been submitted
  };
  virtual Offer on_data_wanted(Stream& stream, std::size_t most) = 0;
  // The frame of the offer made just before; false: `send` returns after it.
  virtual bool on_data_frame(Stream& stream, ByteSpan frame_header, std::size_t size) = 0;
  virtual void on_headers_sent(Stream& stream, bool end) = 0;
  virtual void on_reset_sent(std::uint32_t error_code) = 0;
};

class Session {
 public:
  // Sends SETTINGS and opens the connection's window. Throws std::bad_alloc.
  Session(SessionEvents& events, const ConnectionOptions& options);

  // False: the input is not HTTP/2, or memory is short; nothing more can be done.
  bool receive(ByteSpan bytes);
  // The next frame other than DATA, which goes to on_data_frame: its bytes, valid until the next
  // call. `more` is false if there is none for now. False as for receive.
  bool send(ByteSpan& frame, bool& more);
  bool wants_read() const { return nghttp2_session_want_read(session_.get()) != 0; }
  bool wants_write() const { return nghttp2_session_want_write(session_.get()) != 0; }
  std::size_t queued_frames() const {
    return nghttp2_session_get_outbound_queue_size(session_.get());
  }

  // Makes `stream` what the events of that stream name, until on_closed.
  void attach(Stream& stream);
  // The first headers of an answer; with_data: on_data_wanted is asked for what follows.
  void submit_headers(Stream& stream, std::span<const nghttp2_nv> fields, bool with_data);
  void submit_trailers(const Stream& stream, std::span<const nghttp2_nv> fields);
  void resume(const Stream& stream);
  void reset(const Stream& stream, std::uint32_t error_code);
  void submit_ping(const PingData& data);
  void submit_shutdown_notice();
  void submit_goaway(std::uint32_t error_code, std::string_view why);

  // How much callers may send ahead on streams that they open once they have heard of it; of those
  // that are open it changes by the difference, on_settings_acknowledged.
  void set_initial_window(std::uint32_t size);
  // Lets the caller send so much ahead on one stream.
  void open_window(const Stream& stream, std::uint32_t size);
  // Gives window back for bytes that came.
  void consume_connection(std::size_t size);
  void consume_stream(const Stream& stream, std::size_t size);
  // Whether flow control, the stream's or the connection's, lets nothing be sent on it.
  bool blocked_by_peer(const Stream& stream) const;

 private:
  struct Deleter {
    void operator()(nghttp2_session* session) const { nghttp2_session_del(session); }
  };
  std::unique_ptr<nghttp2_session, Deleter> session_;
};

}  // namespace attnserve::grpc
