// A bare gRPC server on nghttp2: answers each message by one of a third of its size, which is what
// attention's output is of query, key and value. What any server must cost that moves these bytes.
// No checks, no limits: for measuring only.
//
//     echo THREADS
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <nghttp2/nghttp2.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace {

constexpr std::size_t kPrefix = 5;  // of a gRPC message: compressed or not, four bytes of length
constexpr std::size_t kWriteAtOnce = 1U << 20;

struct Stream {
  std::array<std::uint8_t, kPrefix> prefix{};
  std::size_t prefix_size = 0;
  std::size_t expected = 0;
  std::vector<std::uint8_t> body;
  std::string out;
  std::size_t sent = 0;
  bool answered = false;  // its response headers have been submitted
  bool ended = false;     // its caller sends nothing more
};

struct Connection {
  int socket = -1;
  int epoll = -1;
  nghttp2_session* session = nullptr;
  std::unordered_map<std::int32_t, std::unique_ptr<Stream>> streams;
  std::string unwritten;
  std::size_t written = 0;
  bool waits_to_write = false;

  Stream* find(std::int32_t id) {
    const auto found = streams.find(id);
    return found == streams.end() ? nullptr : found->second.get();
  }
};

nghttp2_nv header(const char* name, const char* value) {
  return {reinterpret_cast<std::uint8_t*>(const_cast<char*>(name)),
          reinterpret_cast<std::uint8_t*>(const_cast<char*>(value)), std::strlen(name),
          std::strlen(value), NGHTTP2_NV_FLAG_NONE};
}

ssize_t read_answer(nghttp2_session* session, std::int32_t id, std::uint8_t*, std::size_t length,
                    std::uint32_t* flags, nghttp2_data_source* source, void*) {
  auto* stream = static_cast<Stream*>(source->ptr);
  const std::size_t size = std::min(length, stream->out.size() - stream->sent);
  const bool last = stream->sent + size == stream->out.size();
  if (size == 0 && !stream->ended) return NGHTTP2_ERR_DEFERRED;
  *flags |= NGHTTP2_DATA_FLAG_NO_COPY;
  if (last && stream->ended) {
    *flags |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
    const nghttp2_nv trailer = header("grpc-status", "0");
    nghttp2_submit_trailer(session, id, &trailer, 1);
  }
  return static_cast<ssize_t>(size);
}

int send_data(nghttp2_session*, nghttp2_frame*, const std::uint8_t* frame_header,
              std::size_t length, nghttp2_data_source* source, void* user) {
  auto* connection = static_cast<Connection*>(user);
  auto* stream = static_cast<Stream*>(source->ptr);
  connection->unwritten.append(reinterpret_cast<const char*>(frame_header), 9);
  connection->unwritten.append(stream->out, stream->sent, length);
  stream->sent += length;
  if (stream->sent == stream->out.size()) {
    stream->out.clear();
    stream->sent = 0;
  }
  return 0;
}

void answer(nghttp2_session* session, std::int32_t id, Stream& stream) {
  const std::size_t size = stream.expected / 3;
  for (const std::size_t byte : {std::size_t{0}, size >> 24, size >> 16, size >> 8, size}) {
    stream.out.push_back(static_cast<char>(byte & 0xff));
  }
  stream.out.append(reinterpret_cast<const char*>(stream.body.data()), size);
  stream.body.clear();
  stream.prefix_size = 0;
  if (stream.answered) {
    nghttp2_session_resume_data(session, id);
    return;
  }
  stream.answered = true;
  const std::array headers{header(":status", "200"), header("content-type", "application/grpc")};
  nghttp2_data_provider provider{};
  provider.source.ptr = &stream;
  provider.read_callback = read_answer;
  nghttp2_submit_response(session, id, headers.data(), headers.size(), &provider);
}

int on_begin(nghttp2_session*, const nghttp2_frame* frame, void* user) {
  auto* connection = static_cast<Connection*>(user);
  if (frame->hd.type == NGHTTP2_HEADERS && frame->headers.cat == NGHTTP2_HCAT_REQUEST) {
    connection->streams[frame->hd.stream_id] = std::make_unique<Stream>();
  }
  return 0;
}

int on_data(nghttp2_session* session, std::uint8_t, std::int32_t id, const std::uint8_t* data,
            std::size_t size, void* user) {
  Stream* stream = static_cast<Connection*>(user)->find(id);
  while (stream != nullptr && size > 0) {
    if (stream->prefix_size < kPrefix) {
      stream->prefix[stream->prefix_size++] = *data++;
      --size;
      if (stream->prefix_size < kPrefix) continue;
      stream->expected = 0;
      for (std::size_t i = 1; i < kPrefix; ++i) {
        stream->expected = stream->expected << 8 | stream->prefix[i];
      }
      stream->body.reserve(stream->expected);
    } else {
      const std::size_t taken = std::min(size, stream->expected - stream->body.size());
      stream->body.insert(stream->body.end(), data, data + taken);
      data += taken;
      size -= taken;
    }
    if (stream->body.size() == stream->expected) answer(session, id, *stream);
  }
  return 0;
}

int on_frame(nghttp2_session* session, const nghttp2_frame* frame, void* user) {
  if ((frame->hd.flags & NGHTTP2_FLAG_END_STREAM) == 0) return 0;
  if (Stream* stream = static_cast<Connection*>(user)->find(frame->hd.stream_id)) {
    stream->ended = true;
    nghttp2_session_resume_data(session, frame->hd.stream_id);
  }
  return 0;
}

int on_close(nghttp2_session*, std::int32_t id, std::uint32_t, void* user) {
  static_cast<Connection*>(user)->streams.erase(id);
  return 0;
}

void wait_to_write(Connection& connection, bool wanted) {
  if (connection.waits_to_write == wanted) return;
  connection.waits_to_write = wanted;
  epoll_event event{};
  event.events = wanted ? EPOLLIN | EPOLLOUT : EPOLLIN;
  event.data.ptr = &connection;
  epoll_ctl(connection.epoll, EPOLL_CTL_MOD, connection.socket, &event);
}

// Writes what there is; false once the connection is broken.
bool flush(Connection& connection) {
  for (;;) {
    while (connection.unwritten.size() - connection.written < kWriteAtOnce) {
      const std::uint8_t* data = nullptr;
      const ssize_t size = nghttp2_session_mem_send(connection.session, &data);
      if (size < 0) return false;
      if (size == 0) break;
      connection.unwritten.append(reinterpret_cast<const char*>(data),
                                  static_cast<std::size_t>(size));
    }
    if (connection.written == connection.unwritten.size()) {
      connection.unwritten.clear();
      connection.written = 0;
      wait_to_write(connection, false);
      return true;
    }
    const ssize_t size = write(connection.socket, connection.unwritten.data() + connection.written,
                               connection.unwritten.size() - connection.written);
    if (size < 0) {
      if (errno != EAGAIN) return false;
      wait_to_write(connection, true);
      return true;
    }
    connection.written += static_cast<std::size_t>(size);
    if (connection.written == connection.unwritten.size()) {
      connection.unwritten.clear();
      connection.written = 0;
    }
  }
}

int listen_on(std::uint16_t port) {
  const int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  const int one = 1;
  setsockopt(listener, SOL_SOCKET, SO_REUSEPORT, &one, sizeof one);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0 ||
      listen(listener, 128) != 0) {
    std::perror("echo");
    std::exit(1);
  }
  return listener;
}

std::uint16_t port_of(int listener) {
  sockaddr_in address{};
  socklen_t size = sizeof address;
  getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size);
  return ntohs(address.sin_port);
}

void accept_on(int listener, int epoll, const nghttp2_session_callbacks* callbacks) {
  const int socket = accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
  if (socket < 0) return;
  const int one = 1;
  setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  auto* connection = new Connection;
  connection->socket = socket;
  connection->epoll = epoll;
  nghttp2_session_server_new(&connection->session, callbacks, connection);
  const std::array<nghttp2_settings_entry, 3> settings{
      {{NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, 1000},
       {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, 16U << 20},
       {NGHTTP2_SETTINGS_MAX_FRAME_SIZE, 1U << 20}}};
  nghttp2_submit_settings(connection->session, NGHTTP2_FLAG_NONE, settings.data(), settings.size());
  nghttp2_session_set_local_window_size(connection->session, NGHTTP2_FLAG_NONE, 0, 64 << 20);
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.ptr = connection;
  epoll_ctl(epoll, EPOLL_CTL_ADD, socket, &event);
  flush(*connection);
}

bool serve_once(Connection& connection, std::uint32_t events, std::vector<std::uint8_t>& buffer) {
  if ((events & EPOLLIN) != 0) {
    const ssize_t size = read(connection.socket, buffer.data(), buffer.size());
    if (size == 0 || (size < 0 && errno != EAGAIN)) return false;
    if (size > 0 && nghttp2_session_mem_recv(connection.session, buffer.data(),
                                             static_cast<std::size_t>(size)) < 0) {
      return false;
    }
  }
  return flush(connection);
}

void serve(int listener) {
  const int epoll = epoll_create1(EPOLL_CLOEXEC);
  epoll_event own{};
  own.events = EPOLLIN;
  epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &own);
  nghttp2_session_callbacks* callbacks = nullptr;
  nghttp2_session_callbacks_new(&callbacks);
  nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, on_begin);
  nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_data);
  nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, on_frame);
  nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_close);
  nghttp2_session_callbacks_set_send_data_callback(callbacks, send_data);
  std::vector<std::uint8_t> buffer(1U << 20);
  std::array<epoll_event, 64> events{};
  for (;;) {
    const int count = epoll_wait(epoll, events.data(), static_cast<int>(events.size()), -1);
    for (int i = 0; i < count; ++i) {
      auto* connection = static_cast<Connection*>(events[static_cast<std::size_t>(i)].data.ptr);
      if (connection == nullptr) {
        accept_on(listener, epoll, callbacks);
      } else if (!serve_once(*connection, events[static_cast<std::size_t>(i)].events, buffer)) {
        close(connection->socket);
        nghttp2_session_del(connection->session);
        delete connection;
      }
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const int threads = count > 1 ? std::atoi(arguments[1]) : 1;
  const int first = listen_on(0);
  const std::uint16_t port = port_of(first);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(serve, listen_on(port));
  std::printf("listening on 127.0.0.1:%d (bare nghttp2)\n", port);
  std::fflush(stdout);
  serve(first);
}
