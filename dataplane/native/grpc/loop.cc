#include "grpc/loop.h"

#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <exception>
#include <new>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "base/log.h"
#include "base/status.h"
#include "base/text.h"

namespace attnserve::grpc {
namespace {

constexpr std::size_t kEventsPerRound = 256;
constexpr Duration kHousekeepingInterval = std::chrono::seconds(5);
constexpr std::size_t kMostOtherTimers = 64;  // of what is watched beside connections
constexpr std::uint32_t kReadEvents = EPOLLIN | EPOLLRDHUP | EPOLLET;

Descriptor made(int descriptor, const char* what) {
  if (descriptor < 0) throw std::system_error(errno, std::system_category(), what);
  return Descriptor(descriptor);
}

// Threads of ours take no signals: those are for the threads of the program around.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_{};
};

// Says what was thrown, since one connection must not end the thread of all.
void tell_of_failure(std::string_view what) noexcept {
  try {
    log(Level::kError, what, {{"reason", status_of(std::current_exception()).message}});
  } catch (...) {
    // Without memory for the reason it goes unsaid.
  }
}

template <class Function>
bool carried_out(std::string_view what, Function&& function) noexcept {
  try {
    function();
    return true;
  } catch (...) {
    tell_of_failure(what);
    return false;
  }
}

}  // namespace

// A link and what the loop remembers of it.
class Loop::Entry final : public Watched {
 public:
  Entry(Loop& loop, Arrival arrival)
      : link(std::move(arrival), loop.factory_, loop, loop.now_,
             loop.now_ + loop.handshake_timeout_),
        loop_(loop) {}

  void ready(std::uint32_t events, TimePoint) override {
    link.note(events);
    loop_.touch(*this);
  }
  void expire(TimePoint now) override {
    link.expire(now);
    loop_.touch(*this);
  }

  Link link;
  std::uint32_t interest = kReadEvents;  // that epoll was told of
  std::size_t calls = 0;                 // its part of open_calls_
  bool touched = false;                  // it is in touched_
  bool buried = false;                   // it is in closed_

 private:
  Loop& loop_;
};

Loop::Loop(Service& service, const ConnectionFactory& factory, Duration handshake_timeout,
           std::function<void()> housekeeping)
    : service_(service),
      factory_(factory),
      handshake_timeout_(handshake_timeout),
      housekeeping_(std::move(housekeeping)),
      epoll_(made(epoll_create1(EPOLL_CLOEXEC), "epoll_create1")),
      event_(made(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd")),
      alarm_(made(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK), "timerfd_create")),
      buffer_(std::make_unique<std::array<std::byte, 512 * 1024>>()) {
  // Edge-triggered, they ring each time and never need to be read.
  for (const Descriptor* bell : {&event_, &alarm_}) {
    epoll_event event{};
    event.events = EPOLLIN | EPOLLET;
    event.data.ptr = nullptr;
    if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, bell->get(), &event) != 0) {
      throw std::system_error(errno, std::system_category(), "epoll_ctl");
    }
  }
}

Loop::~Loop() { stop(); }

void Loop::stop() {
  if (!thread_.joinable()) return;
  {
    std::unique_lock lock(mutex_);
    stopping_ = true;
    ring(std::move(lock));
  }
  thread_.join();
}

void Loop::start(const std::string& name) {
  try {
    const SignalsBlocked blocked;
    thread_ = std::thread([this] { run(); });
  } catch (const std::system_error& error) {
    throw std::runtime_error(text("thread ", name, " cannot be started: ", error.what()));
  }
  pthread_setname_np(thread_.native_handle(), name.c_str());
}

void Loop::adopt(Arrival arrival) {
  size_.fetch_add(1, std::memory_order_relaxed);
  struct Adoption {
    Loop& loop;
    Arrival arrival;
    bool done = false;
    Adoption(Loop& to, Arrival from) : loop(to), arrival(std::move(from)) {}
    ~Adoption() {
      if (!done) loop.size_.fetch_sub(1, std::memory_order_relaxed);
    }
  };
  post([adoption = std::make_shared<Adoption>(*this, std::move(arrival))] {
    adoption->loop.add(std::move(adoption->arrival));
    adoption->done = true;
  });
}

void Loop::post(std::function<void()> task) {
  std::unique_lock lock(mutex_);
  posted_.tasks.push_back(std::move(task));
  ring(std::move(lock));
}

void Loop::drain() {
  post([this] {
    draining_ = true;
    for (const auto& [number, entry] : entries_) {
      entry->link.drain(now_);
      touch(*entry);
    }
  });
}

void Loop::abandon() {
  post([this] {
    for (const auto& [number, entry] : entries_) {
      entry->link.abandon();
      touch(*entry);
    }
  });
}

void Loop::wake(Connection& connection) {
  std::unique_lock lock(mutex_);
  try {
    posted_.mail.push_back(connection.number());
  } catch (const std::bad_alloc&) {
    posted_.mail_of_all = true;
  }
  ring(std::move(lock));
}

void Loop::ring(std::unique_lock<std::mutex> lock) {
  const bool must_write = std::exchange(asleep_, false);
  lock.unlock();
  const std::uint64_t one = 1;
  // It cannot fail but by 2^64 rings that nobody has heard.
  if (must_write && write(event_.get(), &one, sizeof(one)) < 0) return;
}

void Loop::watch(int descriptor, std::uint32_t events, Watched& watched) {
  epoll_event event{};
  event.events = events;
  event.data.ptr = &watched;
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, descriptor, &event) != 0) {
    throw std::system_error(errno, std::system_category(), "epoll_ctl");
  }
}

void Loop::rewatch(int descriptor, std::uint32_t events, Watched& watched) {
  epoll_event event{};
  event.events = events;
  event.data.ptr = &watched;
  epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, descriptor, &event);
}

void Loop::unwatch(int descriptor, Watched& watched) {
  epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, descriptor, nullptr);
  timers_.remove(watched);
}

void Loop::run() {
  now_ = Clock::now();
  if (housekeeping_) next_housekeeping_ = now_ + kHousekeepingInterval;
  while (running_) round();
  for (const auto& [number, entry] : entries_) {
    entry->link.abandon();
    timers_.remove(*entry);
  }
  entries_.clear();
  size_ = 0;
  open_calls_ = 0;
}

// One turn of everything. Reading comes first, so that what came together is answered together;
// then whatever is due or was posted; then the service computes; then answers are written.
void Loop::round() {
  std::array<epoll_event, kEventsPerRound> events;
  set_alarm();
  const int count = epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()),
                               may_sleep() ? -1 : 0);
  now_ = Clock::now();
  const TimePoint woken = now_;
  for (int i = 0; i < count; ++i) {
    auto* watched = static_cast<Watched*>(events[static_cast<std::size_t>(i)].data.ptr);
    if (watched != nullptr) watched->ready(events[static_cast<std::size_t>(i)].events, now_);
  }
  take_posted();
  read_sockets();
  run_timers();
  run_service();
  take_posted();
  settle_touched();
  bury_closed();
  service_.after_round(Clock::now() - woken);
}

// Sleeping with a timeout would set a timer of the kernel's for each round; this sets one only
// where something is due earlier than all before.
void Loop::set_alarm() {
  if (alarm_due_ <= now_) alarm_due_ = kNever;  // it has rung
  const TimePoint due = std::min(timers_.next(), next_housekeeping_);
  if (due >= alarm_due_) return;
  const auto since_boot = std::max(due.time_since_epoch(), Duration(1));  // zero would mean never
  const auto whole = std::chrono::floor<std::chrono::seconds>(since_boot);
  itimerspec setting{};
  setting.it_value.tv_sec = whole.count();
  setting.it_value.tv_nsec = (since_boot - whole).count();
  if (timerfd_settime(alarm_.get(), TFD_TIMER_ABSTIME, &setting, nullptr) == 0) alarm_due_ = due;
}

// Decides under the lock, so that whoever posts later knows whether to write to event_.
bool Loop::may_sleep() {
  if (!touched_.empty()) return false;
  const std::scoped_lock lock(mutex_);
  asleep_ = !stopping_ && posted_.empty();
  return asleep_;
}

void Loop::take_posted() {
  {
    const std::scoped_lock lock(mutex_);
    asleep_ = false;
    if (stopping_) running_ = false;
    if (posted_.empty()) return;
    std::swap(posted_, taken_);
  }
  const auto deliver = [this](Entry& entry) {
    Link& link = entry.link;
    if (!carried_out("mail of a connection", [&] { link.take_mail(now_); })) link.abandon();
    touch(entry);
  };
  for (const auto& task : taken_.tasks) carried_out("task of a loop", task);
  for (const std::uint64_t number : taken_.mail) {
    const auto found = entries_.find(number);
    if (found != entries_.end()) deliver(*found->second);
  }
  if (std::exchange(taken_.mail_of_all, false)) {
    for (const auto& [number, entry] : entries_) deliver(*entry);
  }
  taken_.tasks.clear();
  taken_.mail.clear();
}

void Loop::read_sockets() {
  for (Entry* entry : touched_) {
    Link& link = entry->link;
    if (!link.wants_read()) continue;
    if (!carried_out("input of a connection", [&] { link.receive(*buffer_, now_); })) {
      link.abandon();
    }
  }
}

void Loop::run_timers() {
  while (Timed* due = timers_.take_due(now_)) {
    auto* watched = static_cast<Watched*>(due);
    carried_out("timer of a loop", [&] { watched->expire(now_); });
  }
  if (now_ < next_housekeeping_) return;
  next_housekeeping_ = now_ + kHousekeepingInterval;
  carried_out("housekeeping of a loop", housekeeping_);
}

void Loop::run_service() {
  carried_out("service after events", [&] { service_.after_events(); });
}

void Loop::settle_touched() {
  std::swap(touched_, settling_);
  if (settling_.empty()) return;
  now_ = Clock::now();  // the service may have computed for a while
  bool wrote = false;
  for (Entry* entry : settling_) entry->touched = false;
  for (Entry* entry : settling_) wrote |= settle(*entry);
  settling_.clear();
  // What was written may have brought the next messages into motion.
  if (wrote) run_service();
}

// Writes what an entry has to say and sees to what it waits for next. True if it had something.
bool Loop::settle(Entry& entry) {
  Link& link = entry.link;
  const Link::Sent sent = send(link);
  const std::size_t calls = link.open_calls();
  if (calls != entry.calls) {
    open_calls_.fetch_add(calls - entry.calls, std::memory_order_relaxed);
    entry.calls = calls;
  }
  if (link.closed()) {
    if (!std::exchange(entry.buried, true)) closed_.push_back(&entry);
    return sent.any;
  }
  const std::uint32_t events = kReadEvents | (link.blocked() ? EPOLLOUT : 0U);
  if (events != entry.interest) rewatch(link.descriptor(), entry.interest = events, entry);
  schedule(entry, link.next_timer());
  if (sent.more || link.wants_read()) touch(entry);
  return sent.any;
}

Link::Sent Loop::send(Link& link) {
  try {
    return link.send(now_);
  } catch (...) {
    tell_of_failure("output of a connection");
    link.abandon();
    return {};
  }
}

void Loop::touch(Entry& entry) {
  if (!std::exchange(entry.touched, true)) touched_.push_back(&entry);
}

void Loop::add(Arrival arrival) {
  const std::uint64_t number = arrival.number;
  auto entry = std::make_unique<Entry>(*this, std::move(arrival));
  const std::size_t room = entries_.size() + 1;
  for (std::vector<Entry*>* list : {&touched_, &settling_, &closed_}) {
    if (list->capacity() < room) list->reserve(2 * room);
  }
  timers_.reserve(room + kMostOtherTimers);
  Entry& added = *entries_.emplace(number, std::move(entry)).first->second;
  try {
    watch(added.link.descriptor(), kReadEvents, added);
  } catch (...) {
    entries_.erase(number);
    throw;
  }
  if (draining_) added.link.drain(now_);
  touch(added);
}

// Entries are destroyed here alone: until now epoll's answer may have pointed at them.
void Loop::bury_closed() {
  if (closed_.empty()) return;
  for (Entry* entry : closed_) {
    unwatch(entry->link.descriptor(), *entry);
    if (entry->touched) std::erase(touched_, entry);
    const std::uint64_t number = entry->link.number();
    entries_.erase(number);
    service_.connection_closed(number);
    size_.fetch_sub(1, std::memory_order_relaxed);
  }
  closed_.clear();
}

}  // namespace attnserve::grpc
