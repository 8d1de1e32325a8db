// The incoming side of a call: what came of its body and has not been delivered.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "base/clock.h"
#include "base/memory.h"
#include "base/pace.h"
#include "grpc/message_reader.h"

namespace attnserve::grpc {

// While messages may not be delivered, one is read to its end and further bytes are kept as they
// are: undelivered messages, which may be as small as five bytes, never take more than was sent.
// Errors are those of MessageReader.
class Body {
 public:
  Body(ByteBudget& budget, std::size_t max_message_bytes, Encoding encoding, const PaceRule& rule)
      : reader_(budget, max_message_bytes, encoding), pace_(rule), charge_(budget) {}

  // The next message, out of what was kept or from the front of `fresh`; nothing: all was taken.
  std::optional<Bytes> next(ByteSpan& fresh, TimePoint now);
  // Keeps `fresh` for later.
  void keep(ByteSpan fresh, TimePoint now);

  // Bytes that are missing of the message that comes or comes next.
  std::size_t missing() const { return reader_.missing(); }
  // A message has begun, and all that came of it has been taken.
  bool under_way() const { return reader_.under_way(); }
  bool drained() const { return !ready_ && kept_.empty(); }  // all whole messages are delivered
  // When the message under way will have been too slow, unless more of it comes before.
  TimePoint due() const { return under_way() ? pace_.due() : kNever; }
  Status late() const { return pace_.late("body"); }
  // Time in which the caller could not send does not count.
  void forgive(Duration pause) { pace_.forgive(pause); }

 private:
  std::optional<Bytes> read(ByteSpan& bytes, TimePoint now);
  void drop_taken();

  MessageReader reader_;
  Pace pace_;  // of the message under way
  std::optional<Bytes> ready_;
  std::vector<std::byte> kept_;  // from kept_taken_ on
  std::size_t kept_taken_ = 0;
  Lease charge_;  // of kept_
};

}  // namespace attnserve::grpc
