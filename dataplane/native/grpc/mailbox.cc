#include "grpc/mailbox.h"

#include <utility>

#include "grpc/stream.h"

namespace attnserve::grpc {

void Mailbox::deliver(Mail mail) {
  if (inside()) {
    drain();  // what was asked for before comes first
    if (reader_ != nullptr) reader_->carry_out(std::move(mail));
    return;
  }
  const std::lock_guard lock(mutex_);
  if (reader_ == nullptr) return;  // `mail` is destroyed by the caller, after the lock is gone
  box_.push_back(std::move(mail));
  waiting_.store(true, std::memory_order_release);
  if (std::exchange(woken_, true)) return;
  reader_->wake();
}

void Mailbox::drain() {
  while (waiting()) {
    std::vector<Mail> mails = take();
    for (Mail& mail : mails) reader_->carry_out(std::move(mail));
  }
}

std::vector<Mail> Mailbox::take() {
  const std::lock_guard lock(mutex_);
  woken_ = false;
  waiting_.store(false, std::memory_order_release);
  return std::exchange(box_, {});
}

void Mailbox::close() {
  std::vector<Mail> dropped;  // destroyed unlocked, for its messages may have owners of any kind
  const std::lock_guard lock(mutex_);
  reader_ = nullptr;
  dropped.swap(box_);
}

}  // namespace attnserve::grpc
