// Decode over bare nghttp2, one message after another: what steps cost a caller in C++.
//
//     decode HOST:PORT FILE SECONDS
//
// FILE holds the groups of a round: for each, uint32 whether it is timed and uint32 how many
// messages it has; for each message, uint32 its size and a serialised DecodeRequest that begins
// with its request_id, tag and 5 bytes, filled in here. (Little-endian.) A group is sent at once,
// and the next one when all of it has been answered. Rounds until SECONDS are over, of which the
// first tenth is not counted. One line of JSON: milliseconds that the timed groups of a round took
// together, and the bytes that the socket moved in them.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <nghttp2/nghttp2.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kPrefix = 5;   // of a gRPC message: compressed or not, four bytes of length
constexpr std::size_t kIdBytes = 5;  // of a request_id, padded
constexpr std::uint8_t kIdTag = 0x08;
constexpr std::uint8_t kErrorTag = 0x42;  // field 8 of DecodeResponse

[[noreturn]] void give_up(const std::string& why) {
  std::fprintf(stderr, "decode: %s\n", why.c_str());
  std::exit(1);
}

struct Group {
  bool timed = false;
  std::size_t messages = 0;
  std::string bytes;               // of all its messages, each with its prefix
  std::vector<std::size_t> id_at;  // where their request ids lie
};

std::uint32_t number(const std::string& from, std::size_t& at) {
  if (at + 4 > from.size()) give_up("FILE ends too early");
  std::uint32_t value = 0;
  std::memcpy(&value, from.data() + at, 4);
  at += 4;
  return value;
}

std::vector<Group> read_groups(const char* path) {
  std::ifstream file(path, std::ios::binary);
  const std::string all{std::istreambuf_iterator<char>(file), {}};
  std::vector<Group> groups;
  for (std::size_t at = 0; at < all.size();) {
    Group& group = groups.emplace_back();
    group.timed = number(all, at) != 0;
    group.messages = number(all, at);
    for (std::size_t i = 0; i < group.messages; ++i) {
      const std::uint32_t size = number(all, at);
      if (at + size > all.size() || size < 1 + kIdBytes || all[at] != kIdTag) {
        give_up("FILE has a message without a request_id of 5 bytes");
      }
      group.bytes.push_back(0);
      for (int shift = 24; shift >= 0; shift -= 8) {
        group.bytes.push_back(static_cast<char>(size >> shift & 0xff));
      }
      group.id_at.push_back(group.bytes.size() + 1);
      group.bytes.append(all, at, size);
      at += size;
    }
  }
  return groups;
}

// One Decode call on a connection of its own.
class Stream {
 public:
  explicit Stream(const std::string& target) {
    const std::size_t colon = target.rfind(':');
    sockaddr_in address{};
    address.sin_family = AF_INET;
    if (colon == std::string::npos ||
        inet_pton(AF_INET, target.substr(0, colon).c_str(), &address.sin_addr) != 1) {
      give_up("not HOST:PORT: " + target);
    }
    address.sin_port = htons(static_cast<std::uint16_t>(std::atoi(target.c_str() + colon + 1)));
    socket_ = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(socket_, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
      give_up("cannot connect to " + target);
    }
    const int one = 1;
    setsockopt(socket_, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    nghttp2_session_callbacks* callbacks = nullptr;
    nghttp2_session_callbacks_new(&callbacks);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_data);
    nghttp2_session_callbacks_set_on_header_callback(callbacks, on_header);
    nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_close);
    nghttp2_session_client_new(&session_, callbacks, this);
    nghttp2_session_callbacks_del(callbacks);
    const nghttp2_settings_entry window{NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, 1U << 24};
    nghttp2_submit_settings(session_, NGHTTP2_FLAG_NONE, &window, 1);
    nghttp2_session_set_local_window_size(session_, NGHTTP2_FLAG_NONE, 0, 1 << 26);
    const std::string path = "/attnserve.v1.AttentionService/Decode";
    const std::array headers{field(":method", "POST"), field(":scheme", "http"),
                             field(":path", path),     field(":authority", target),
                             field("te", "trailers"),  field("content-type", "application/grpc")};
    nghttp2_data_provider body{};
    body.read_callback = on_read;
    stream_ =
        nghttp2_submit_request(session_, nullptr, headers.data(), headers.size(), &body, nullptr);
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() {
    nghttp2_session_del(session_);
    close(socket_);
  }

  // Sends a group and waits for its answers.
  void exchange(Group& group) {
    for (const std::size_t at : group.id_at) {
      std::uint64_t id = ++last_id_;
      for (std::size_t i = 0; i < kIdBytes; ++i, id >>= 7) {
        group.bytes[at + i] = static_cast<char>((id & 0x7f) | (i + 1 < kIdBytes ? 0x80 : 0));
      }
    }
    out_ = group.bytes;
    answers_left_ = group.messages;
    nghttp2_session_resume_data(session_, stream_);
    while (write_all(), answers_left_ > 0) {
      const ssize_t got = recv(socket_, buffer_.data(), buffer_.size(), 0);
      if (got <= 0) give_up("the connection was closed");
      moved_ += static_cast<std::size_t>(got);
      if (nghttp2_session_mem_recv(session_, buffer_.data(), static_cast<std::size_t>(got)) < 0) {
        give_up("what was received is no HTTP/2");
      }
    }
  }

  std::size_t moved() const { return moved_; }

 private:
  static nghttp2_nv field(std::string_view name, std::string_view value) {
    return {reinterpret_cast<std::uint8_t*>(const_cast<char*>(name.data())),
            reinterpret_cast<std::uint8_t*>(const_cast<char*>(value.data())), name.size(),
            value.size(), NGHTTP2_NV_FLAG_NONE};
  }

  // What nghttp2 has to send is gathered, so that a group of small messages is one write.
  void write_all() {
    for (;;) {
      gathered_.clear();
      while (gathered_.size() < (1U << 20)) {
        const std::uint8_t* frame = nullptr;
        const ssize_t size = nghttp2_session_mem_send(session_, &frame);
        if (size < 0) give_up(nghttp2_strerror(static_cast<int>(size)));
        if (size == 0) break;
        gathered_.append(reinterpret_cast<const char*>(frame), static_cast<std::size_t>(size));
      }
      if (gathered_.empty()) return;
      for (std::size_t at = 0; at < gathered_.size();) {
        const ssize_t sent = send(socket_, gathered_.data() + at, gathered_.size() - at, 0);
        if (sent <= 0) give_up("the connection was closed");
        at += static_cast<std::size_t>(sent);
        moved_ += static_cast<std::size_t>(sent);
      }
    }
  }

  static ssize_t on_read(nghttp2_session*, std::int32_t, std::uint8_t* into, std::size_t most,
                         std::uint32_t*, nghttp2_data_source*, void* user) {
    std::string_view& out = static_cast<Stream*>(user)->out_;
    const std::size_t size = std::min(most, out.size());
    if (size == 0) return NGHTTP2_ERR_DEFERRED;
    std::memcpy(into, out.data(), size);
    out.remove_prefix(size);
    return static_cast<ssize_t>(size);
  }

  static int on_data(nghttp2_session*, std::uint8_t, std::int32_t, const std::uint8_t* data,
                     std::size_t size, void* user) {
    static_cast<Stream*>(user)->take(data, size);
    return 0;
  }

  // Looks at the beginning of each message; its tensors are passed over.
  void take(const std::uint8_t* data, std::size_t size) {
    while (size > 0) {
      if (head_.size() < kPrefix) {
        head_.push_back(static_cast<char>(*data++));
        --size;
        if (head_.size() < kPrefix) continue;
        left_ = 0;
        for (std::size_t i = 1; i < kPrefix; ++i) {
          left_ = left_ << 8 | static_cast<std::uint8_t>(head_[i]);
        }
        begun_.clear();
      }
      const std::size_t taken = std::min(size, left_);
      begun_.append(reinterpret_cast<const char*>(data),
                    std::min(taken, std::size_t{512} - std::min<std::size_t>(512, begun_.size())));
      data += taken;
      size -= taken;
      left_ -= taken;
      if (left_ == 0) answered();
    }
  }

  void answered() {
    head_.clear();
    std::size_t at = 1;
    while (at < begun_.size() && (begun_[at] & 0x80) != 0) ++at;
    if (++at < begun_.size() && static_cast<std::uint8_t>(begun_[at]) == kErrorTag) {
      give_up("answered by an error: " + begun_.substr(at));
    }
    if (answers_left_ == 0) give_up("more answers than requests");
    --answers_left_;
  }

  static int on_header(nghttp2_session*, const nghttp2_frame*, const std::uint8_t* name,
                       std::size_t name_size, const std::uint8_t* value, std::size_t value_size,
                       std::uint8_t, void*) {
    const std::string_view text(reinterpret_cast<const char*>(name), name_size);
    if (text == "grpc-message") {
      give_up(std::string(reinterpret_cast<const char*>(value), value_size));
    }
    return 0;
  }

  static int on_close(nghttp2_session*, std::int32_t, std::uint32_t, void*) {
    give_up("the stream was ended");
  }

  int socket_ = -1;
  nghttp2_session* session_ = nullptr;
  std::int32_t stream_ = -1;
  std::uint64_t last_id_ = 0;
  std::string_view out_;
  std::string gathered_, head_, begun_;
  std::size_t left_ = 0, answers_left_ = 0, moved_ = 0;
  std::vector<std::uint8_t> buffer_ = std::vector<std::uint8_t>(1U << 18);
};

double quantile(std::vector<double>& values, double share) {
  const auto index = static_cast<std::size_t>(share * static_cast<double>(values.size()));
  const auto at = values.begin() + static_cast<long>(std::min(values.size() - 1, index));
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) {
    std::fprintf(stderr, "decode HOST:PORT FILE SECONDS\n");
    return 2;
  }
  std::vector<Group> groups = read_groups(arguments[2]);
  if (groups.empty()) give_up("FILE has no groups");
  Stream stream(arguments[1]);
  const double seconds = std::atof(arguments[3]);
  const auto start = Clock::now();
  const auto since = [](Clock::time_point from) {
    return std::chrono::duration<double, std::milli>(Clock::now() - from).count();
  };
  std::vector<double> rounds;
  double round_bytes = 0;
  while (since(start) < seconds * 1e3 || rounds.empty()) {
    double took = 0;
    std::size_t moved = 0;
    for (Group& group : groups) {
      const auto begun = Clock::now();
      const std::size_t before = stream.moved();
      stream.exchange(group);
      if (!group.timed) continue;
      took += since(begun);
      moved += stream.moved() - before;
    }
    if (since(start) < seconds * 1e2) continue;
    rounds.push_back(took);
    round_bytes += static_cast<double>(moved);
  }
  const double mean_bytes = round_bytes / static_cast<double>(rounds.size());
  std::printf(
      "{\"rounds\": %zu, \"p10_ms\": %.4f, \"p50_ms\": %.4f, \"p99_ms\": %.4f, "
      "\"bytes\": %.1f}\n",
      rounds.size(), quantile(rounds, 0.1), quantile(rounds, 0.5), quantile(rounds, 0.99),
      mean_bytes);
}
