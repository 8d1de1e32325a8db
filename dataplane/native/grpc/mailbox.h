// How calls reach their connection from any thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <variant>
#include <vector>

#include "base/memory.h"
#include "base/status.h"

namespace attnserve::grpc {

class Stream;

struct PauseWish {};
struct ResumeWish {};

// What a call is asked for: a message, its end, or flow control.
struct Mail {
  std::shared_ptr<Stream> stream;
  std::variant<OutMessage, Status, PauseWish, ResumeWish> wish;
};

class MailReader {
 public:
  virtual ~MailReader() = default;
  // On the connection's thread. Calls no handler, for one may be the caller: what has to be told
  // is told later.
  virtual void carry_out(Mail mail) = 0;
  virtual void wake() = 0;  // on any; the mailbox's lock is held
};

// Carries out at once what is asked for while the connection itself is at work on this thread, and
// keeps for it what anybody else asks for. The order of wishes is kept in any case. Outlives the
// connection, for as long as there are calls.
class Mailbox {
 public:
  explicit Mailbox(MailReader& reader) : reader_(&reader) {}

  // Any thread. Nothing happens once the mailbox is closed.
  void deliver(Mail mail);

  // The rest is the connection's, on its own thread.
  void enter() { inside_.store(std::this_thread::get_id(), std::memory_order_relaxed); }
  void leave() { inside_.store(std::thread::id(), std::memory_order_relaxed); }
  void drain();  // carries out all there is
  bool waiting() const { return waiting_.load(std::memory_order_acquire); }
  void close();

 private:
  bool inside() const {
    return inside_.load(std::memory_order_relaxed) == std::this_thread::get_id();
  }
  std::vector<Mail> take();

  // The connection's thread while it is at work; no other thread can find its own id here.
  std::atomic<std::thread::id> inside_{};
  // Whether there is something in box_, to be asked without the lock.
  std::atomic<bool> waiting_{false};

  std::mutex mutex_;  // guards what follows; reader_ is changed and used unlocked by its own thread
  MailReader* reader_;
  std::vector<Mail> box_;
  bool woken_ = false;  // the connection has been told and has not looked since
};

}  // namespace attnserve::grpc
