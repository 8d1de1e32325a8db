// Open-loop load by a bare nghttp2 client: one thread, four connections, no
// copies of the request. gRPC's own client takes several times as long for a
// call, so that beyond some thousands a second it is the client that is
// measured. One line of JSON at the end.
//
//     flood HOST:PORT METHOD FILE RATE SECONDS DEADLINE
//
// FILE holds the request's serialised message. Poisson arrivals; answers are
// timed from when they were due, and are good if they came within the deadline;
// refusals (RESOURCE_EXHAUSTED) from when they were sent. A call whose deadline
// has passed is reset, as gRPC's clients do.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <nghttp2/nghttp2.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <string_view>

#include "figures.h"

namespace {

constexpr std::size_t kConnections = 4;
constexpr std::size_t kMostUnwritten = 1U
                                       << 18; // serialised ahead of the socket
constexpr std::size_t kReadAtOnce = 1U << 18;
constexpr double kDrainSeconds = 5.0;
constexpr int kDeadlineExceeded = 4, kResourceExhausted = 8, kUnavailable = 14;

struct Call {
  Clock::time_point due, sent, deadline;
  std::size_t body_sent = 0;
  std::int32_t stream = -1; // -1: over
  std::size_t connection = 0;
  int status = -1;
  std::string message;
};

struct Piece {
  std::string own; // or, if that is empty, a part of the request
  std::size_t begin = 0, size = 0;
};

class Flood {
public:
  Flood(sockaddr_in address, std::string authority, std::string method,
        std::string request, double deadline)
      : address_(address), authority_(std::move(authority)),
        method_(std::move(method)), request_(std::move(request)),
        timeout_(std::to_string(static_cast<long>(deadline * 1e6)) + "u"),
        deadline_(of_seconds(deadline)), epoll_(epoll_create1(0)),
        timer_(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK)) {
    watch(timer_, kConnections, EPOLLIN);
    for (std::size_t i = 0; i < kConnections; ++i)
      connect(i);
  }

  Figures run(double rate, double seconds) {
    start_ = Clock::now();
    const auto stop = start_ + of_seconds(seconds);
    std::mt19937 random(1);
    std::exponential_distribution<double> gap(rate);
    auto due = start_ + of_seconds(gap(random));
    auto now = start_;
    while (now < stop) {
      for (; due <= now && due < stop; due += of_seconds(gap(random)))
        send(due, now);
      turn(std::min(due, stop), now);
      now = Clock::now();
    }
    figures_.seconds = milliseconds(now - start_) * 1e-3;
    const auto given_up = now + deadline_ + of_seconds(kDrainSeconds);
    while (under_way_ > 0 && now < given_up) {
      turn(now + std::chrono::milliseconds(1), now);
      now = Clock::now();
    }
    return std::move(figures_);
  }

private:
  struct Connection {
    Flood *flood = nullptr;
    int socket = -1;
    nghttp2_session *session = nullptr;
    std::deque<Piece> unwritten;
    std::size_t unwritten_bytes = 0, first_written = 0;
    bool writable = true, broken = false;
  };

  void watch(int descriptor, std::size_t index, std::uint32_t events) {
    epoll_event event{};
    event.events = events;
    event.data.u64 = index;
    epoll_ctl(epoll_, EPOLL_CTL_ADD, descriptor, &event);
  }

  void connect(std::size_t index) {
    Connection &made = connections_[index];
    if (made.session != nullptr)
      nghttp2_session_del(made.session);
    if (made.socket >= 0)
      close(made.socket);
    made = Connection{};
    made.flood = this;
    made.socket = socket(AF_INET, SOCK_STREAM, 0);
    if (::connect(made.socket, reinterpret_cast<const sockaddr *>(&address_),
                  sizeof address_) != 0) {
      std::perror("flood: connect");
      std::exit(1);
    }
    const int one = 1;
    setsockopt(made.socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    nghttp2_session_callbacks *callbacks = nullptr;
    nghttp2_session_callbacks_new(&callbacks);
    nghttp2_session_callbacks_set_send_data_callback(callbacks, on_send_data);
    nghttp2_session_callbacks_set_on_header_callback(callbacks, on_header);
    nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_close);
    nghttp2_session_client_new(&made.session, callbacks, &made);
    nghttp2_session_callbacks_del(callbacks);
    const nghttp2_settings_entry window{NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE,
                                        1U << 24};
    nghttp2_submit_settings(made.session, NGHTTP2_FLAG_NONE, &window, 1);
    nghttp2_session_set_local_window_size(made.session, NGHTTP2_FLAG_NONE, 0,
                                          1 << 26);
    watch(made.socket, index, EPOLLIN | EPOLLOUT | EPOLLET);
  }

  void send(Clock::time_point due, Clock::time_point now) {
    auto call = std::make_unique<Call>();
    call->due = due;
    call->sent = now;
    call->deadline = now + deadline_;
    call->connection = next_++ % kConnections;
    figures_.starts.push_back(milliseconds(now - due));
    const auto field = [](std::string_view name, std::string_view value) {
      return nghttp2_nv{
          reinterpret_cast<std::uint8_t *>(const_cast<char *>(name.data())),
          reinterpret_cast<std::uint8_t *>(const_cast<char *>(value.data())),
          name.size(), value.size(),
          NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE};
    };
    const std::array headers{field(":method", "POST"),
                             field(":scheme", "http"),
                             field(":path", method_),
                             field(":authority", authority_),
                             field("te", "trailers"),
                             field("content-type", "application/grpc"),
                             field("grpc-timeout", timeout_)};
    nghttp2_data_provider body{};
    body.source.ptr = call.get();
    body.read_callback = on_read;
    nghttp2_session *session = connections_[call->connection].session;
    call->stream = nghttp2_submit_request(session, nullptr, headers.data(),
                                          headers.size(), &body, call.get());
    ++under_way_;
    calls_.push_back(std::move(call));
  }

  // Writes, sleeps until something happens, reads.
  void turn(Clock::time_point until, Clock::time_point now) {
    for (; !calls_.empty() &&
           (calls_.front()->stream < 0 || calls_.front()->deadline <= now);
         calls_.pop_front()) {
      Call &late = *calls_.front();
      if (late.stream < 0)
        continue;
      nghttp2_session *session = connections_[late.connection].session;
      nghttp2_session_set_stream_user_data(session, late.stream, nullptr);
      nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, late.stream,
                                NGHTTP2_CANCEL);
      // Its frames may refer to it until they are out.
      end(late, kDeadlineExceeded, "the deadline passed");
      abandoned_.push_back(std::move(calls_.front()));
    }
    for (Connection &connection : connections_)
      write(connection);
    if (abandoned_.size() > 100'000)
      abandoned_.erase(abandoned_.begin(), abandoned_.end() - 50'000);
    itimerspec when{};
    const auto wait = std::max(until - Clock::now(), Clock::duration(1));
    when.it_value.tv_sec = static_cast<time_t>(wait.count() / 1'000'000'000);
    when.it_value.tv_nsec = static_cast<long>(wait.count() % 1'000'000'000);
    timerfd_settime(timer_, 0, &when, nullptr);
    std::array<epoll_event, kConnections + 1> events;
    const int count = epoll_wait(epoll_, events.data(),
                                 static_cast<int>(events.size()), 1000);
    for (int i = 0; i < count; ++i) {
      const std::uint64_t index = events[static_cast<std::size_t>(i)].data.u64;
      if (index == kConnections)
        continue; // the timer, which is set anew
      Connection &connection = connections_[index];
      const std::uint32_t what = events[static_cast<std::size_t>(i)].events;
      if ((what & EPOLLOUT) != 0)
        connection.writable = true;
      if ((what & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0)
        read(connection);
      if (connection.broken)
        lose(index);
    }
  }

  void read(Connection &connection) {
    while (!connection.broken) {
      const ssize_t got =
          recv(connection.socket, buffer_.get(), kReadAtOnce, MSG_DONTWAIT);
      if (got < 0 && errno == EAGAIN)
        return;
      if (got <= 0 ||
          nghttp2_session_mem_recv(connection.session, buffer_.get(),
                                   static_cast<std::size_t>(got)) < 0) {
        connection.broken = true;
      }
    }
  }

  void write(Connection &connection) {
    while (connection.writable && !connection.broken) {
      while (connection.unwritten_bytes < kMostUnwritten) {
        const std::uint8_t *frame = nullptr;
        const ssize_t size =
            nghttp2_session_mem_send(connection.session, &frame);
        if (size < 0)
          connection.broken = true;
        if (size <= 0)
          break;
        connection.unwritten.push_back(
            {std::string(reinterpret_cast<const char *>(frame),
                         static_cast<std::size_t>(size)),
             0, static_cast<std::size_t>(size)});
        connection.unwritten_bytes += static_cast<std::size_t>(size);
      }
      if (connection.unwritten.empty())
        return;
      std::array<iovec, 64> parts;
      std::size_t count = 0, skip = connection.first_written;
      for (const Piece &piece : connection.unwritten) {
        if (count == parts.size())
          break;
        const char *data = piece.own.empty() ? request_.data() + piece.begin
                                             : piece.own.data();
        parts[count++] = {const_cast<char *>(data) + skip, piece.size - skip};
        skip = 0;
      }
      const ssize_t sent =
          writev(connection.socket, parts.data(), static_cast<int>(count));
      if (sent < 0) {
        if (errno == EAGAIN || errno == EWOULDBLOCK)
          connection.writable = false;
        if (connection.writable)
          connection.broken = true;
        return;
      }
      connection.unwritten_bytes -= static_cast<std::size_t>(sent);
      connection.first_written += static_cast<std::size_t>(sent);
      while (!connection.unwritten.empty() &&
             connection.first_written >= connection.unwritten.front().size) {
        connection.first_written -= connection.unwritten.front().size;
        connection.unwritten.pop_front();
      }
    }
  }

  // Its calls have failed; the next ones use a new one.
  void lose(std::size_t index) {
    for (const auto &call : calls_) {
      if (call->connection == index)
        end(*call, kUnavailable, "the connection was closed");
    }
    connect(index);
  }

  void end(Call &call, int status, std::string_view message) {
    if (call.stream < 0)
      return;
    call.stream = -1;
    --under_way_;
    const auto now = Clock::now();
    ++figures_.statuses[status];
    if (status != 0)
      figures_.messages.emplace(status, message);
    if (status == 0) {
      const auto took = now - call.due;
      figures_.answers.push_back(milliseconds(took));
      if (took <= deadline_)
        ++figures_.good;
      if (figures_.first < 0)
        figures_.first = milliseconds(now - start_);
    } else if (status == kResourceExhausted) {
      figures_.refusals.push_back(milliseconds(now - call.sent));
    }
  }

  // The request with its prefix, which `request_` begins with.
  static ssize_t on_read(nghttp2_session *, std::int32_t, std::uint8_t *,
                         std::size_t most, std::uint32_t *flags,
                         nghttp2_data_source *source, void *user) {
    const auto *call = static_cast<Call *>(source->ptr);
    const std::string &request =
        static_cast<Connection *>(user)->flood->request_;
    const std::size_t size = std::min(most, request.size() - call->body_sent);
    *flags |= NGHTTP2_DATA_FLAG_NO_COPY;
    if (call->body_sent + size == request.size())
      *flags |= NGHTTP2_DATA_FLAG_EOF;
    return static_cast<ssize_t>(size);
  }

  static int on_send_data(nghttp2_session *, nghttp2_frame *,
                          const std::uint8_t *header, std::size_t size,
                          nghttp2_data_source *source, void *user) {
    auto &connection = *static_cast<Connection *>(user);
    if (connection.unwritten_bytes >= kMostUnwritten)
      return NGHTTP2_ERR_WOULDBLOCK;
    auto *call = static_cast<Call *>(source->ptr);
    connection.unwritten.push_back(
        {std::string(reinterpret_cast<const char *>(header), 9), 0, 9});
    if (size > 0)
      connection.unwritten.push_back({{}, call->body_sent, size});
    call->body_sent += size;
    connection.unwritten_bytes += 9 + size;
    return 0;
  }

  static int on_header(nghttp2_session *session, const nghttp2_frame *frame,
                       const std::uint8_t *name, std::size_t name_size,
                       const std::uint8_t *value, std::size_t value_size,
                       std::uint8_t, void *) {
    auto *call = static_cast<Call *>(
        nghttp2_session_get_stream_user_data(session, frame->hd.stream_id));
    if (call == nullptr)
      return 0;
    const std::string_view field(reinterpret_cast<const char *>(name),
                                 name_size);
    const std::string text(reinterpret_cast<const char *>(value), value_size);
    if (field == "grpc-status")
      call->status = std::atoi(text.c_str());
    if (field == "grpc-message")
      call->message = text;
    return 0;
  }

  static int on_close(nghttp2_session *session, std::int32_t stream,
                      std::uint32_t error, void *user) {
    auto *call = static_cast<Call *>(
        nghttp2_session_get_stream_user_data(session, stream));
    if (call == nullptr)
      return 0;
    const int status = call->status >= 0 ? call->status : kUnavailable;
    static_cast<Connection *>(user)->flood->end(
        *call, status,
        call->status >= 0 ? call->message
                          : "reset with " + std::to_string(error));
    return 0;
  }

  const sockaddr_in address_;
  const std::string authority_, method_, request_, timeout_;
  const Clock::duration deadline_;
  const int epoll_, timer_;
  const std::unique_ptr<std::uint8_t[]> buffer_ =
      std::make_unique<std::uint8_t[]>(kReadAtOnce);
  std::array<Connection, kConnections> connections_;
  std::deque<std::unique_ptr<Call>> calls_; // in the order of their deadlines
  std::deque<std::unique_ptr<Call>>
      abandoned_; // given up, but perhaps not yet forgotten
  std::size_t next_ = 0, under_way_ = 0;
  Clock::time_point start_;
  Figures figures_;
};

} // namespace

int main(int count, char **arguments) {
  const std::string target = count == 7 ? arguments[1] : "";
  const std::size_t colon = target.rfind(':');
  sockaddr_in address{};
  address.sin_family = AF_INET;
  if (colon == std::string::npos ||
      inet_pton(AF_INET, target.substr(0, colon).c_str(), &address.sin_addr) !=
          1) {
    std::fprintf(stderr, "flood HOST:PORT METHOD FILE RATE SECONDS DEADLINE\n");
    return 2;
  }
  address.sin_port =
      htons(static_cast<std::uint16_t>(std::atoi(target.c_str() + colon + 1)));
  std::ifstream file(arguments[3], std::ios::binary);
  std::string request(std::istreambuf_iterator<char>(file), {});
  const std::size_t size = request.size();
  std::string prefix(1, '\0'); // not compressed, then its size
  for (const std::size_t shift : {24U, 16U, 8U, 0U}) {
    prefix.push_back(static_cast<char>(size >> shift & 0xff));
  }
  Flood flood(address, target, arguments[2], prefix + request,
              std::atof(arguments[6]));
  Figures figures = flood.run(std::atof(arguments[4]), std::atof(arguments[5]));
  print(figures);
}
