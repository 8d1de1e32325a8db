// gRPC calls over real sockets, from the caller's first byte to the threads that answer.
#include <doctest/doctest.h>
#include <malloc.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <fstream>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "grpc/server.h"
#include "grpc_harness.h"
#include "grpc_sockets.h"

using namespace attnserve;
using namespace attnserve::grpc;
using namespace attnserve::grpc::test;
using namespace std::chrono_literals;

namespace {

// A thread that does what others ask for, one after another.
class Worker {
 public:
  ~Worker() {
    {
      const std::scoped_lock lock(mutex_);
      over_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  void ask(std::function<void()> task) {
    {
      const std::scoped_lock lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    changed_.notify_all();
  }

 private:
  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return over_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
      lock.lock();
    }
  }

  std::mutex mutex_;  // guards the two below
  std::deque<std::function<void()>> tasks_;
  bool over_ = false;
  std::condition_variable changed_;
  std::thread thread_{[this] { run(); }};
};

// "/echo" answers at once, "/worker" from another thread in three messages, "/batch" once all of a
// round have come, "/hold" when it is told to.
class Methods final : public Service {
 public:
  std::variant<Reception, Status> accept(std::shared_ptr<Call> call) override {
    return Reception{std::make_unique<Handler>(*this, std::move(call)), 64U << 20};
  }
  void after_events() override {
    std::vector<std::function<void()>> due;
    {
      const std::scoped_lock lock(mutex_);
      std::erase_if(batch_, [&](auto& each) {
        if (each.first != std::this_thread::get_id()) return false;
        due.push_back(std::move(each.second));
        return true;
      });
    }
    for (const auto& each : due) each();
  }
  void release_held() {
    const std::scoped_lock lock(mutex_);
    for (const auto& call : held_) call->finish({});
    held_.clear();
  }

  std::atomic<int> cancelled{0};
  std::atomic<int> late{0};

 private:
  struct Handler final : CallHandler {
    Handler(Methods& the_methods, std::shared_ptr<Call> the_call)
        : methods(the_methods), call(std::move(the_call)) {}
    void on_message(Bytes bytes) override {
      const auto shared = std::make_shared<Bytes>(std::move(bytes));
      if (call->info().path == "/worker") {
        methods.worker_.ask([to = call, shared] { answer(*to, *shared); });
      } else if (call->info().path == "/batch") {
        const std::scoped_lock lock(methods.mutex_);
        methods.batch_.emplace_back(std::this_thread::get_id(),
                                    [to = call, shared] { answer(*to, *shared); });
      } else if (call->info().path == "/hold") {
        const std::scoped_lock lock(methods.mutex_);
        methods.held_.push_back(call);
      } else {
        call->send(OutMessage::of(std::move(*shared)));
        call->finish({});
      }
    }
    void on_half_close() override {}
    void on_end(Code reason) override {
      if (reason == Code::kCancelled) ++methods.cancelled;
      if (reason == Code::kDeadlineExceeded) ++methods.late;
    }
    static void answer(Call& to, const Bytes& bytes) {
      for (int i = 0; i < 3; ++i) to.send(message_of(text_of(bytes)));
      to.finish({});
    }

    Methods& methods;
    std::shared_ptr<Call> call;
  };

  std::mutex mutex_;  // guards the two below
  std::vector<std::pair<std::thread::id, std::function<void()>>> batch_;
  std::vector<std::shared_ptr<Call>> held_;
  Worker worker_;
};

struct Serving {
  explicit Serving(ServerOptions options = {}) {
    if (options.addresses.empty()) options.addresses = {"127.0.0.1:0"};
    server = Server::create(methods, budget, std::move(options));
    server->start();
  }
  std::string address() const { return server->addresses().front(); }

  ByteBudget budget{1U << 30};
  Methods methods;
  std::unique_ptr<Server> server;
};

// A caller at the other end of a socket.
class RemoteCaller {
 public:
  explicit RemoteCaller(const std::string& address) : client_(address) {}

  std::int32_t call(const std::string& path, const std::string& message, const Fields& more = {}) {
    const std::string body = framed(message);
    const std::int32_t id = caller.call(path, &body, more);
    talk();
    return id;
  }
  void talk() { client_.send(caller.outgoing()); }
  // Listens until the condition holds; false if the server ends or is silent for too long.
  template <class Condition>
  bool until(Condition condition) {
    std::string bytes(1U << 16, '\0');
    while (!condition()) {
      if (!client_.readable()) return false;
      const ssize_t got = recv(client_.get(), bytes.data(), bytes.size(), 0);
      if (got <= 0) return false;
      caller.receive(std::string_view(bytes).substr(0, static_cast<std::size_t>(got)));
      talk();
    }
    return true;
  }
  bool until_ended(std::int32_t id) {
    return until([&] { return caller.exchange(id).ended; });
  }

  Caller caller;

 private:
  Client client_;
};

}  // namespace

TEST_CASE("calls are answered over sockets, whatever thread answers") {
  Serving serving;
  RemoteCaller remote(serving.address());
  for (const std::size_t size : {0UL, 1UL, 1000UL, 3UL << 20}) {
    const std::string message(size, 'm');
    const std::int32_t echo = remote.call("/echo", message);
    const std::int32_t worker = remote.call("/worker", message);
    const std::int32_t batch = remote.call("/batch", message);
    for (const std::int32_t id : {echo, worker, batch}) {
      REQUIRE(remote.until_ended(id));
      CHECK(remote.caller.exchange(id).status() == "0");
      const std::vector<std::string> answers = remote.caller.exchange(id).messages();
      CHECK(answers == std::vector<std::string>(id == echo ? 1 : 3, message));
    }
  }
  CHECK(eventually([&] { return serving.server->open_calls() == 0; }));
  CHECK(serving.budget.lent() == 0);
}

TEST_CASE("a deadline comes though nothing else happens") {
  Serving serving;
  RemoteCaller remote(serving.address());
  const TimePoint before = Clock::now();
  const std::int32_t id = remote.call("/hold", "x", {{"grpc-timeout", "80m"}});
  REQUIRE(remote.until_ended(id));
  CHECK(remote.caller.exchange(id).status() == "4");
  CHECK(Clock::now() - before >= 75ms);
  CHECK(eventually([&] { return serving.methods.late == 1; }));
}

TEST_CASE(
    "who says nothing is gone after the header timeout, who does nothing after the idle one") {
  ServerOptions options;
  options.connection.header_timeout = 100ms;
  options.connection.idle_timeout = 200ms;
  Serving serving(options);
  Client silent(serving.address());
  RemoteCaller idle(serving.address());
  REQUIRE(idle.until_ended(idle.call("/echo", "x")));
  CHECK(silent.receive(1000).size() < 1000);  // what is said at the end, and the end
  CHECK(idle.until([&] { return !idle.caller.goaways.empty(); }));
  CHECK(idle.caller.goaways.back().first == NGHTTP2_NO_ERROR);
  CHECK(eventually([&] { return serving.server->connections() == 0; }));
}

TEST_CASE("a drain says so at once, lets the call under way end, and then is done") {
  Serving serving;
  RemoteCaller remote(serving.address());
  const std::int32_t id = remote.call("/hold", "x");
  CHECK(eventually([&] { return serving.server->open_calls() == 1; }));
  std::atomic<bool> drained{false};
  std::thread drain([&] { drained = serving.server->drain(10s); });
  CHECK(remote.until([&] { return !remote.caller.goaways.empty(); }));
  CHECK_FALSE(drained);
  serving.methods.release_held();
  CHECK(remote.until_ended(id));
  CHECK(remote.caller.exchange(id).status() == "0");
  CHECK_FALSE(remote.until([] { return false; }));  // and then the server closes
  drain.join();
  CHECK(drained);
}

TEST_CASE("calls that outlast a drain are cancelled") {
  Serving serving;
  RemoteCaller remote(serving.address());
  const std::int32_t id = remote.call("/hold", "x");
  CHECK(eventually([&] { return serving.server->open_calls() == 1; }));
  CHECK_FALSE(serving.server->drain(100ms));
  CHECK(serving.methods.cancelled == 1);
  CHECK_FALSE(remote.until_ended(id));
  CHECK_FALSE(remote.caller.goaways.empty());
  serving.methods.release_held();  // does nothing any more
}

TEST_CASE("callers who leave in the midst of answers harm nobody") {
  Serving serving;
  std::atomic<int> answered{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 6; ++i) {
    threads.emplace_back([&, i] {
      for (int round = 0; round < 30; ++round) {
        RemoteCaller remote(serving.address());
        std::vector<std::int32_t> ids;
        for (const char* path : {"/worker", "/batch", "/echo", "/worker"}) {
          ids.push_back(remote.call(path, std::string(20000, 'x')));
        }
        if (i % 2 != 0) continue;  // gone at once
        for (const std::int32_t id : ids) {
          if (remote.until_ended(id)) ++answered;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(answered == 3 * 30 * 4);
  CHECK(eventually([&] { return serving.server->connections() == 0; }));
  CHECK(serving.server->open_calls() == 0);
  CHECK(eventually([&] { return serving.budget.lent() == 0; }));
}

TEST_CASE("a server may be destroyed while others still answer its calls") {
  for (int i = 0; i < 10; ++i) {
    auto methods = std::make_unique<Methods>();
    ByteBudget budget(1U << 30);
    ServerOptions options;
    options.addresses = {"127.0.0.1:0"};
    auto server = Server::create(*methods, budget, options);
    server->start();
    RemoteCaller remote(server->addresses().front());
    for (int k = 0; k < 50; ++k) remote.call("/worker", std::string(5000, 'x'));
    server.reset();
    methods.reset();
  }
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
namespace {

std::size_t resident_bytes() {
  std::size_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages >> pages;  // the second number
  return pages * static_cast<std::size_t>(getpagesize());
}

}  // namespace

TEST_CASE("an idle connection takes less than 20 KB") {
  Serving serving;
  constexpr std::size_t kConnections = 400;
  malloc_trim(0);  // so that what others have freed is not what these take
  const std::size_t before = resident_bytes();
  std::vector<std::unique_ptr<Client>> clients;
  for (std::size_t i = 0; i < kConnections; ++i) {
    clients.push_back(std::make_unique<Client>(serving.address()));
    clients.back()->send(Caller().outgoing());
    CHECK(clients.back()->readable());
  }
  CHECK(eventually([&] { return serving.server->connections() == kConnections; }));
  CHECK(resident_bytes() < before + kConnections * 20000);
}
#endif
