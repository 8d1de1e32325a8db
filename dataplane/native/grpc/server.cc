#include "grpc/server.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <filesystem>
#include <future>
#include <iterator>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "base/text.h"
#include "grpc/acceptor.h"
#include "grpc/listener.h"
#include "grpc/loop.h"
#include "grpc/places.h"
#include "grpc/server_of.h"
#include "grpc/tls.h"

namespace attnserve::grpc {
namespace {

constexpr Duration kClosingTime = std::chrono::seconds(2);  // for threads to close what is left

std::size_t open_descriptors() {
  std::error_code failure;  // without /proc, none are known of
  const std::filesystem::directory_iterator all("/proc/self/fd", failure);
  return static_cast<std::size_t>(std::distance(begin(all), end(all)));
}

// As many connections as descriptors allow, with those kept free that others will need.
std::size_t most_connections(const ServerOptions& options) {
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  const std::size_t used = open_descriptors() + options.reserved_descriptors;
  if (limit.rlim_cur <= used) {
    throw std::runtime_error(text("the limit of ", limit.rlim_cur,
                                  " open descriptors leaves none for connections: ", used,
                                  " are in use or kept free"));
  }
  const std::size_t left = limit.rlim_cur - used;
  return options.max_connections == 0 ? left : std::min(left, options.max_connections);
}

class ThreadedServer final : public Server {
 public:
  ThreadedServer(Service& service, ConnectionFactory factory, ServerOptions options)
      : service_(service), factory_(std::move(factory)), options_(std::move(options)) {
    if (options_.tls) tls_ = TlsContext::create(*options_.tls);
  }
  ~ThreadedServer() override { stop(); }

  void start() override;
  std::vector<std::string> addresses() const override;
  bool drain(Duration timeout) override;
  void replace_tls(const TlsOptions& options) override {
    if (!tls_) throw std::runtime_error("TLS: the server was started without");
    tls_->replace(options);
  }
  std::size_t connections() const override { return places_ ? places_->taken() : 0; }
  std::size_t open_calls() const override;

 private:
  void start_all();
  void stop();
  void hand_over(Arrival arrival);
  void stop_listening();

  Service& service_;
  const ConnectionFactory factory_;
  const ServerOptions options_;
  std::unique_ptr<TlsContext> tls_;
  std::unique_ptr<Places> places_;
  std::vector<std::unique_ptr<Acceptor>> acceptors_;
  std::vector<std::unique_ptr<Loop>> loops_;  // acceptors live on the first
};

void ThreadedServer::start() {
  try {
    start_all();
  } catch (...) {
    stop();
    throw;
  }
}

// The first loop goes first, so that nobody is handed over to one that has gone; all threads have
// ended before any loop is destroyed, since what one of them computes may wake the others.
void ThreadedServer::stop() {
  for (const auto& loop : loops_) loop->stop();
  loops_.clear();
  acceptors_.clear();
}

void ThreadedServer::start_all() {
  if (options_.addresses.empty()) throw std::runtime_error("there is no address to listen on");
  std::vector<Listener> listeners;
  for (const std::string& address : options_.addresses) {
    std::vector<Listener> more = listen(address);
    std::move(more.begin(), more.end(), std::back_inserter(listeners));
  }
  for (std::size_t i = 0; i < std::max<std::size_t>(options_.threads, 1); ++i) {
    loops_.push_back(std::make_unique<Loop>(service_, factory_, options_.connection.header_timeout,
                                            i == 0 ? trim_bytes_pool : nullptr));
  }
  places_ =
      std::make_unique<Places>(most_connections(options_), options_.max_connections_per_address);
  for (Listener& listener : listeners) {
    acceptors_.push_back(
        std::make_unique<Acceptor>(*loops_.front(), std::move(listener), *places_, tls_.get(),
                                   [this](Arrival arrival) { hand_over(std::move(arrival)); }));
    acceptors_.back()->start();
  }
  // The first loop, which accepts, starts last: it hands over to loops that run.
  for (std::size_t i = loops_.size(); i-- > 0;) loops_[i]->start(text("grpc-", i));
}

std::vector<std::string> ThreadedServer::addresses() const {
  std::vector<std::string> texts;
  for (const auto& acceptor : acceptors_) texts.push_back(text_of(acceptor->address()));
  return texts;
}

void ThreadedServer::hand_over(Arrival arrival) {
  const auto least = std::min_element(
      loops_.begin(), loops_.end(),
      [](const auto& one, const auto& other) { return one->size() < other->size(); });
  (*least)->adopt(std::move(arrival));
}

// Returns once nobody is accepted any more, so that a drain counts all who were.
void ThreadedServer::stop_listening() {
  std::promise<void> stopped;
  loops_.front()->post([&] {
    for (const auto& acceptor : acceptors_) acceptor->stop();
    stopped.set_value();
  });
  stopped.get_future().wait();
}

bool ThreadedServer::drain(Duration timeout) {
  if (loops_.empty()) return true;
  const TimePoint end = Clock::now() + timeout;
  stop_listening();
  for (const auto& loop : loops_) loop->drain();
  if (places_->wait_until_none(end)) return true;
  for (const auto& loop : loops_) loop->abandon();
  places_->wait_until_none(Clock::now() + kClosingTime);
  return false;
}

std::size_t ThreadedServer::open_calls() const {
  std::size_t sum = 0;
  for (const auto& loop : loops_) sum += loop->open_calls();
  return sum;
}

}  // namespace

std::unique_ptr<Server> server_of(Service& service, ConnectionFactory factory,
                                  ServerOptions options) {
  return std::make_unique<ThreadedServer>(service, std::move(factory), std::move(options));
}

std::unique_ptr<Server> Server::create(Service& service, ByteBudget& budget,
                                       ServerOptions options) {
  ConnectionFactory factory = [&service, &budget, connection = options.connection](
                                  Waker& waker, std::uint64_t number, std::string peer,
                                  TimePoint now) {
    return Connection::create(service, budget, waker, connection, number, std::move(peer), now);
  };
  return server_of(service, std::move(factory), std::move(options));
}

}  // namespace attnserve::grpc
