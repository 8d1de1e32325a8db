// Decompression of one message.
#pragma once

#include <zlib.h>

#include <cstddef>

#include "base/memory.h"
#include "grpc/headers.h"
#include "grpc/message_buffer.h"

namespace attnserve::grpc {

// Inflates a message as its bytes come, counting what comes out while it comes out. Errors are
// RequestError: INTERNAL for bytes that are no such stream, RESOURCE_EXHAUSTED for a message that
// becomes larger than allowed or than the budget has left. After an error it is of no more use.
class Inflater {
 public:
  // Takes `encoding` other than kIdentity. Its own memory is charged too.
  Inflater(Encoding encoding, ByteBudget& budget, std::size_t max_message_bytes);
  ~Inflater() { inflateEnd(&stream_); }
  Inflater(const Inflater&) = delete;
  Inflater& operator=(const Inflater&) = delete;

  void take(ByteSpan compressed, MessageBuffer& into);
  bool ended() const { return ended_; }  // the stream of zlib says that it was all

 private:
  // Inflates into what room there is; false once no more can come out of what was taken.
  bool step(MessageBuffer& into);

  z_stream stream_{};
  Lease charge_;
  std::size_t max_message_bytes_;
  bool ended_ = false;
};

}  // namespace attnserve::grpc
