// Arbitrary bytes, or frames made of them, to a connection whose service echoes. Invariants: calls
// under way are exactly those that have not ended, and when all is over nothing is lent.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "base/log.h"
#include "base/memory.h"
#include "grpc/call.h"
#include "grpc/connection.h"

namespace attnserve::grpc {
namespace {

void require(bool condition) {
  if (!condition) std::abort();
}

// Reads the input as numbers and texts; zeros once it is used up.
class Input {
 public:
  explicit Input(std::string_view bytes) : rest_(bytes) {}

  bool empty() const { return rest_.empty(); }
  unsigned byte() {
    if (rest_.empty()) return 0;
    const auto value = static_cast<unsigned char>(rest_.front());
    rest_.remove_prefix(1);
    return value;
  }
  std::string_view text(std::size_t size) {
    const std::string_view taken = rest_.substr(0, size);
    rest_.remove_prefix(taken.size());
    return taken;
  }
  std::string_view all() { return text(rest_.size()); }

 private:
  std::string_view rest_;
};

// Echoes; the path says what else it does, and every call must hear of its end exactly once.
class EchoHandler final : public CallHandler {
 public:
  EchoHandler(std::shared_ptr<Call> call, std::size_t& open) : call_(std::move(call)), open_(open) {
    ++open_;
  }
  ~EchoHandler() override {
    require(ended_);
    --open_;
  }

  void on_message(Bytes message) override {
    require(!ended_ && !half_closed_);
    const char mode = call_->info().path.empty() ? '\0' : call_->info().path.back();
    if (mode == 'p' && ++messages_ % 2 == 1) call_->pause();
    if (mode == 'f') call_->finish({Code::kAborted, std::string(message.size(), '\xC3'), {}});
    if (mode == 't') throw RequestError(Code::kNotFound, "thrown");
    call_->send(OutMessage::of(std::move(message)));
    if (mode == 'r') call_->resume();
  }
  void on_half_close() override {
    require(!ended_ && !half_closed_);
    half_closed_ = true;
    call_->finish({});
  }
  void on_all_sent() override { require(!ended_ && call_->unsent() == 0); }
  void on_end(Code) override {
    require(!ended_ && call_->ended());
    ended_ = true;
    call_->send({});
  }

 private:
  std::shared_ptr<Call> call_;
  std::size_t& open_;
  std::size_t messages_ = 0;
  bool half_closed_ = false;
  bool ended_ = false;
};

class EchoService final : public Service {
 public:
  std::variant<Reception, Status> accept(std::shared_ptr<Call> call) override {
    if (call->info().path.ends_with('n')) return Status{Code::kUnimplemented, "none", {}};
    calls.push_back(call);
    return Reception{std::make_unique<EchoHandler>(std::move(call), open), 100'000};
  }

  std::vector<std::shared_ptr<Call>> calls;
  std::size_t open = 0;
};

class NoWaker final : public Waker {
 public:
  void wake(Connection&) override {}
};

std::string frame(unsigned type, unsigned flags, std::uint32_t stream, std::string_view payload) {
  std::string all;
  for (const int shift : {16, 8, 0}) all += static_cast<char>(payload.size() >> shift);
  all += static_cast<char>(type);
  all += static_cast<char>(flags);
  for (const int shift : {24, 16, 8, 0}) all += static_cast<char>(stream >> shift);
  return all.append(payload);
}

// A field as HPACK's literal that is not indexed; name and value are shorter than 127 bytes.
std::string field(std::string_view name, std::string_view value) {
  std::string all(1, '\0');
  all += static_cast<char>(name.size());
  all += name;
  all += static_cast<char>(value.size());
  return all.append(value);
}

// The headers of a call, most of them good.
std::string request(Input& input) {
  constexpr std::string_view kModes = "epftrnx";
  constexpr std::string_view kEncodings[] = {"identity", "gzip", "deflate", "other"};
  constexpr std::string_view kTimeouts[] = {"1S", "20m", "0n", "never", "99999999H"};
  const unsigned choice = input.byte();
  std::string block = "\x83\x86\x04\x03/x";  // POST, http, :path of three bytes
  block += kModes[choice % kModes.size()];
  block += "\x01\x01h";     // :authority of one byte
  block += "\x0f\x10\x10";  // content-type of sixteen bytes
  block += "application/grpc";
  if ((choice & 0x80U) != 0) {
    const unsigned more = input.byte();
    block += field("grpc-encoding", kEncodings[more % 4]);
    if (more >= 0x40) block += field("grpc-timeout", kTimeouts[more / 4 % 5]);
    if (more >= 0xC0) block += input.text(input.byte());
  }
  return block;
}

// A message with its prefix, which may lie a little.
std::string message(Input& input) {
  const unsigned choice = input.byte();
  const std::size_t size = (choice & 0xFU) == 0xF ? 30'000 : choice & 0xFU;
  std::string body((choice & 0x10U) != 0 ? input.text(size) : std::string_view());
  body.resize(size, 'm');
  const std::size_t announced = (choice & 0x20U) != 0 ? size + input.byte() : size;
  std::string all(1, static_cast<char>((choice & 0x40U) != 0));
  for (const int shift : {24, 16, 8, 0}) all += static_cast<char>(announced >> shift);
  return all + body;
}

class Session {
 public:
  Session() {
    ConnectionOptions options;
    options.max_concurrent_streams = 20;
    options.stream_window = 1U << 16;
    options.connection_window = 1U << 18;
    options.max_frame_size = 1U << 16;
    options.max_header_bytes = 1U << 10;
    options.max_unsent_bytes = 100'000;
    options.idle_timeout = std::chrono::seconds(60);
    options.keepalive_interval = std::chrono::seconds(90);
    options.max_age = std::chrono::minutes(10);
    options.max_resets = 50;
    connection_ = Connection::create(service_, budget_, waker_, options, 1, "unix:", now_);
  }
  ~Session() {
    connection_.reset();
    require(service_.open == 0);
    for (const auto& call : service_.calls) {
      require(call->ended() && call->unsent() == 0);
      call->send({});
      call->finish({});
    }
    service_.calls.clear();
    require(budget_.lent() == 0);
  }

  void greet() { receive("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, {})); }

  void receive(std::string_view bytes) {
    if (connection_->finished()) return;
    connection_->receive({reinterpret_cast<const std::byte*>(bytes.data()), bytes.size()}, now_);
    check();
  }

  // What a socket takes: at most so many bytes.
  void write(std::size_t most) {
    iovec parts[8];
    while (most > 0) {
      const std::size_t count = connection_->output(parts);
      if (count == 0) break;
      std::size_t taken = 0;
      for (std::size_t i = 0; i < count && taken < most; ++i) {
        const std::size_t part = std::min(most - taken, parts[i].iov_len);
        const auto* bytes = static_cast<const unsigned char*>(parts[i].iov_base);
        for (std::size_t at = 0; at < part; at += 64) sum_ += bytes[at];  // it can be read
        taken += part;
      }
      connection_->written(taken, now_);
      most -= taken;
      check();
    }
  }

  void pass(Duration time) {
    const TimePoint goal = now_ + time;
    for (int i = 0; i < 100 && connection_->next_timer() <= goal; ++i) {
      now_ = std::max(now_, connection_->next_timer());
      connection_->on_timer(now_);
      check();
    }
    require(connection_->next_timer() > goal || now_ <= goal);
    now_ = goal;
  }

  // What a service does when it likes.
  void act(unsigned choice) {
    if (service_.calls.empty()) return;
    Call& call = *service_.calls[choice / 8 % service_.calls.size()];
    switch (choice % 8) {
      case 0:
        return call.pause();
      case 1:
        return call.resume();
      case 2:
        return call.finish({Code::kInternal, "acted", {}});
      case 3: {
        Bytes bytes = Bytes::allocate(70'000);
        std::fill(bytes.span().begin(), bytes.span().end(), std::byte{1});
        return call.send(OutMessage::of(std::move(bytes)));
      }
      case 4:
        return call.send({});
      case 5:
        return connection_->drain(now_);
      default:
        return connection_->take_mail(now_);
    }
  }

 private:
  void check() { require(service_.open <= connection_->open_calls()); }

  TimePoint now_{std::chrono::hours(1)};
  ByteBudget budget_{1U << 20};
  EchoService service_;
  NoWaker waker_;
  std::unique_ptr<Connection> connection_;
  unsigned sum_ = 0;
};

void play(Session& session, Input& input) {
  std::uint32_t newest = 0;
  const auto stream = [&] { return std::max<std::uint32_t>(newest, 1) - 2 * (input.byte() % 8); };
  while (!input.empty()) {
    const unsigned choice = input.byte();
    const unsigned flags = choice >> 7U;  // END_STREAM
    switch (choice % 16) {
      case 0:
      case 1:
        newest += newest == 0 ? 1 : 2;
        session.receive(frame(1, flags | 4U, newest, request(input)));
        break;
      case 2:
      case 3:
      case 4:
        session.receive(frame(0, flags, newest, message(input)));
        break;
      case 5:
        session.receive(frame(0, flags, stream(), message(input)));
        break;
      case 6: {
        const std::uint32_t id = stream();
        session.receive(frame(0, flags, id, input.text(input.byte())));
        break;
      }
      case 7:
        session.receive(frame(3, 0, stream(), std::string("\0\0\0\x08", 4)));
        break;
      case 8: {
        const std::uint32_t id = flags != 0 ? 0 : stream();
        std::string size(4, '\0');
        size[2] = static_cast<char>(input.byte());
        session.receive(frame(8, 0, id, size));
        break;
      }
      case 9:
        session.receive(frame(6, flags, 0, "12345678"));
        break;
      case 10: {  // SETTINGS_INITIAL_WINDOW_SIZE
        std::string setting("\0\x04\0\0", 4);
        setting += static_cast<char>(input.byte());
        setting += '\0';
        session.receive(frame(4, 0, 0, setting));
        break;
      }
      case 11:
        session.pass(std::chrono::milliseconds(1U << (choice >> 4U)));
        break;
      case 12:
        session.pass(std::chrono::seconds(1U << (choice >> 5U)));
        break;
      case 13:
        session.act(input.byte());
        break;
      case 14:
        session.write(std::size_t{1} << (input.byte() % 20));
        break;
      default: {
        const unsigned type = input.byte();
        const unsigned more = input.byte();
        session.receive(frame(type, more, flags != 0 ? 0 : newest, input.text(input.byte())));
      }
    }
  }
}

}  // namespace
}  // namespace attnserve::grpc

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace attnserve::grpc;
  static const bool quiet = [] {
    attnserve::set_log_sink([](const attnserve::LogRecord&) {});
    return true;
  }();
  (void)quiet;
  Input input({reinterpret_cast<const char*>(data), size});
  Session session;
  switch (input.byte() % 4) {
    case 0:
      session.receive(input.all());
      break;
    case 1:
      session.greet();
      session.receive(input.all());
      break;
    default:
      session.greet();
      play(session, input);
  }
  session.write(std::size_t{1} << 24);
  return 0;
}
