// For tests of sockets: a connection that sends back what it gets, and plain clients that wait.
#pragma once

#include <poll.h>
#include <sys/socket.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "grpc/address.h"
#include "grpc/descriptor.h"
#include "grpc/server_of.h"

namespace attnserve::grpc {

// What connections of a test have in common, and what became of them.
struct EchoRecord {
  std::atomic<std::size_t> most_unsent{1U << 20};  // beyond which nothing is read
  std::atomic<std::size_t> lost{0};
  std::atomic<std::size_t> drained{0};
  std::atomic<std::size_t> timers{0};
  std::atomic<std::size_t> mails{0};
  std::atomic<std::size_t> received{0};             // bytes
  std::atomic<bool> timer_gives_up{false};          // instead of saying "timer"
  std::atomic<std::int64_t> timer_milliseconds{0};  // after the first byte; 0: no timer
  std::mutex mutex;                                 // guards the rest
  std::vector<std::string> peers;
  std::vector<std::thread::id> threads;  // where each was made
  Connection* latest = nullptr;
  Waker* waker = nullptr;
};

// Sends back every byte; ends after a '!', whatever follows it, or once drained and all is written.
// A '?' is a call that is never answered.
class EchoConnection final : public Connection {
 public:
  EchoConnection(EchoRecord& record, std::uint64_t number) : record_(record), number_(number) {}
  ~EchoConnection() override {
    const std::scoped_lock lock(record_.mutex);
    if (record_.latest == this) record_.latest = nullptr;
  }

  void receive(ByteSpan bytes, TimePoint now) override {
    record_.received += bytes.size();
    if (heard_all_) return;
    const std::string_view fresh(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    const std::size_t end = fresh.find('!');
    heard_all_ = end != std::string_view::npos;
    over_ |= heard_all_;
    unsent_.append(heard_all_ ? fresh.substr(0, end + 1) : fresh);
    if (unsent_.ends_with('?')) asked_ = true;
    const std::int64_t wait = record_.timer_milliseconds;
    if (wait > 0) due_ = now + std::chrono::milliseconds(wait);
  }
  std::size_t output(std::span<iovec> into) override {
    if (unsent_.empty()) return 0;
    into[0] = {unsent_.data(), unsent_.size()};
    return 1;
  }
  void written(std::size_t size, TimePoint) override { unsent_.erase(0, size); }
  void take_mail(TimePoint) override {
    ++record_.mails;
    unsent_ += "mail";
  }
  TimePoint next_timer() const override { return due_; }
  void on_timer(TimePoint) override {
    ++record_.timers;
    due_ = kNever;
    if (record_.timer_gives_up) {
      unsent_.clear();
      over_ = true;
    } else {
      unsent_ += "timer";
    }
  }
  void drain(TimePoint) override {
    ++record_.drained;
    over_ = !asked_;
  }
  void lost() override { ++record_.lost; }
  bool wants_read() const override { return unsent_.size() < record_.most_unsent; }
  bool finished() const override { return over_ && unsent_.empty(); }
  std::size_t open_calls() const override { return asked_ ? 1 : 0; }
  std::uint64_t number() const override { return number_; }

 private:
  EchoRecord& record_;
  const std::uint64_t number_;
  std::string unsent_;
  TimePoint due_ = kNever;
  bool over_ = false;       // ends once all is written
  bool heard_all_ = false;  // after a '!'
  bool asked_ = false;
};

inline ConnectionFactory echo_factory(EchoRecord& record) {
  return [&record](Waker& waker, std::uint64_t number, std::string peer, TimePoint) {
    auto made = std::make_unique<EchoConnection>(record, number);
    const std::scoped_lock lock(record.mutex);
    record.peers.push_back(std::move(peer));
    record.threads.push_back(std::this_thread::get_id());
    record.latest = made.get();
    record.waker = &waker;
    return made;
  };
}

// Refuses every call; counts the rounds of its loops.
class NoService final : public Service {
 public:
  std::variant<Reception, Status> accept(std::shared_ptr<Call>) override {
    return Status{Code::kUnimplemented, "", {}};
  }
  void after_events() override { ++rounds; }
  std::atomic<std::size_t> rounds{0};
};

// A blocking socket with a time limit on everything.
class Client {
 public:
  static constexpr int kPatience = 5000;  // milliseconds

  explicit Client(const std::string& address) : Client(resolve(address).front()) {}
  explicit Client(const SocketAddress& address, int receive_buffer = 0)
      : socket_(socket(address.family(), SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    if (receive_buffer > 0) {
      setsockopt(get(), SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof(receive_buffer));
    }
    if (connect(get(), address.get(), address.size) != 0) throw std::runtime_error("connect");
  }

  int get() const { return socket_.get(); }
  void send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t sent = ::send(get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent < 0) return;  // what the server does then is looked at by reading
      bytes.remove_prefix(static_cast<std::size_t>(sent));
    }
  }
  // As many bytes, or fewer if the other side ends or is silent for too long.
  std::string receive(std::size_t size) {
    std::string got(size, '\0');
    std::size_t have = 0;
    while (have < size && readable()) {
      const ssize_t more = recv(get(), got.data() + have, size - have, 0);
      if (more <= 0) break;
      have += static_cast<std::size_t>(more);
    }
    got.resize(have);
    return got;
  }
  // Whether the other side has closed, with nothing left to read.
  bool at_end() {
    char byte = 0;
    return readable() && recv(get(), &byte, 1, 0) <= 0;
  }
  bool readable(int milliseconds = kPatience) {
    pollfd waited{get(), POLLIN, 0};
    return poll(&waited, 1, milliseconds) == 1;
  }

 private:
  Descriptor socket_;
};

template <class Condition>
bool eventually(Condition condition) {
  for (int i = 0; i < 500; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return false;
}

}  // namespace attnserve::grpc
