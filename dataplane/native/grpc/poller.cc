#include "grpc/poller.h"

#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <system_error>

namespace attnserve::grpc {
namespace {

Descriptor made(int descriptor, const char* what) {
  if (descriptor < 0) throw std::system_error(errno, std::system_category(), what);
  return Descriptor(descriptor);
}

// `watched` is nullptr for what only wakes.
int control(const Descriptor& epoll, int operation, int descriptor, std::uint32_t events,
            Watched* watched) {
  epoll_event event{};
  event.events = events;
  event.data.ptr = watched;
  return epoll_ctl(epoll.get(), operation, descriptor, &event);
}

}  // namespace

Poller::Poller()
    : epoll_(made(epoll_create1(EPOLL_CLOEXEC), "epoll_create1")),
      bell_(made(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd")),
      alarm_(made(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK), "timerfd_create")) {
  // Edge-triggered, they wake each time and never need to be read.
  for (const Descriptor* each : {&bell_, &alarm_}) {
    if (control(epoll_, EPOLL_CTL_ADD, each->get(), EPOLLIN | EPOLLET, nullptr) != 0) {
      throw std::system_error(errno, std::system_category(), "epoll_ctl");
    }
  }
}

void Poller::watch(int descriptor, std::uint32_t events, Watched& watched) {
  if (control(epoll_, EPOLL_CTL_ADD, descriptor, events, &watched) != 0) {
    throw std::system_error(errno, std::system_category(), "epoll_ctl");
  }
}

void Poller::rewatch(int descriptor, std::uint32_t events, Watched& watched) {
  control(epoll_, EPOLL_CTL_MOD, descriptor, events, &watched);
}

void Poller::unwatch(int descriptor) {
  epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, descriptor, nullptr);
}

void Poller::wait(bool may_sleep, TimePoint due, TimePoint now) {
  if (may_sleep) set_alarm(due, now);
  const int count = epoll_wait(epoll_.get(), events_.data(), static_cast<int>(events_.size()),
                               may_sleep ? -1 : 0);
  found_ = std::span(events_).first(static_cast<std::size_t>(std::max(count, 0)));
}

void Poller::tell_ready(TimePoint now) {
  for (const epoll_event& event : found_) {
    auto* watched = static_cast<Watched*>(event.data.ptr);
    if (watched != nullptr) watched->ready(event.events, now);
  }
}

void Poller::ring() {
  const std::uint64_t one = 1;
  // It cannot fail but by 2^64 rings that nobody has heard.
  if (write(bell_.get(), &one, sizeof(one)) < 0) return;
}

// Waiting with a time limit would set a timer of the kernel's each time; this sets one only where
// something is due earlier than all before.
void Poller::set_alarm(TimePoint due, TimePoint now) {
  if (alarm_due_ <= now) alarm_due_ = kNever;  // it has rung
  if (due >= alarm_due_) return;
  const auto since_boot = std::max(due.time_since_epoch(), Duration(1));  // zero would mean never
  const auto whole = std::chrono::floor<std::chrono::seconds>(since_boot);
  itimerspec setting{};
  setting.it_value.tv_sec = whole.count();
  setting.it_value.tv_nsec = (since_boot - whole).count();
  if (timerfd_settime(alarm_.get(), TFD_TIMER_ABSTIME, &setting, nullptr) == 0) alarm_due_ = due;
}

}  // namespace attnserve::grpc
