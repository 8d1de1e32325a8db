// One thread and what it waits for: sockets, timers, and what other threads ask of it.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "base/clock.h"
#include "grpc/call.h"
#include "grpc/connection.h"
#include "grpc/link.h"
#include "grpc/poller.h"
#include "grpc/timers.h"

namespace attnserve::grpc {

class Loop final : public Waker {
 public:
  // All references outlive it. `housekeeping`, if any, is called every few seconds. Throws
  // std::system_error.
  Loop(Service& service, const ConnectionFactory& factory, Duration handshake_timeout,
       std::function<void()> housekeeping);
  ~Loop() override;  // stops

  // Throws std::runtime_error that says which thread and why.
  void start(const std::string& name);
  // Ends the thread at once: calls under way end as lost. What is posted later is not carried out.
  void stop();

  // Any thread, until destruction:
  void adopt(Arrival arrival);  // of a socket that this loop serves from now on; may throw
                                // std::bad_alloc, and the socket is closed then
  void post(std::function<void()> task);  // runs on the loop's thread
  void drain();                           // of all connections, those to come too
  void abandon();                         // of all connections at once
  void wake(Connection& connection) override;
  // Sockets adopted and not closed.
  std::size_t size() const { return size_.load(std::memory_order_relaxed); }
  std::size_t open_calls() const { return open_calls_.load(std::memory_order_relaxed); }

  // On the loop's thread, or before `start`:
  Poller& poller() { return poller_; }
  void unwatch(int descriptor, Watched& watched);  // its timer too
  void schedule(Watched& watched, TimePoint due) { timers_.schedule(watched, due); }

 private:
  class Entry;

  void run();
  void round();
  bool may_sleep();
  void take_posted();
  void read_sockets();
  void run_timers();
  void settle_touched();
  bool settle(Entry& entry);
  Link::Sent send(Link& link);
  void touch(Entry& entry);
  void add(Arrival arrival);
  void bury_closed();
  void run_service();

  Service& service_;
  const ConnectionFactory& factory_;
  const Duration handshake_timeout_;
  const std::function<void()> housekeeping_;
  Poller poller_;
  std::thread thread_;
  std::atomic<std::size_t> size_{0};
  std::atomic<std::size_t> open_calls_{0};

  // What other threads ask for.
  struct Posted {
    std::vector<std::function<void()>> tasks;
    std::vector<std::uint64_t> mail;  // numbers of connections
    bool mail_of_all = false;         // there was no memory for a number
    bool empty() const { return tasks.empty() && mail.empty() && !mail_of_all; }
  };
  std::mutex mutex_;  // guards the three below
  Posted posted_;
  bool asleep_ = false;  // whoever posts next must ring, and sets this to false
  bool stopping_ = false;
  void ring(std::unique_lock<std::mutex> lock);

  // Of the thread alone.
  TimePoint now_{};
  TimePoint next_housekeeping_ = kNever;
  bool draining_ = false;
  bool running_ = true;
  std::unordered_map<std::uint64_t, std::unique_ptr<Entry>> entries_;
  Timers timers_;
  Posted taken_;  // swapped with posted_, so that neither allocates again and again
  // Entries to read from or to settle in this round. Each is in `touched_` once at most, and they
  // have room for all entries, so that adding never fails.
  std::vector<Entry*> touched_;
  std::vector<Entry*> settling_;
  std::vector<Entry*> closed_;
  std::unique_ptr<std::array<std::byte, 512 * 1024>> buffer_;
};

}  // namespace attnserve::grpc
