#include "grpc/inflater.h"

#include <algorithm>
#include <array>

#include "base/status.h"
#include "base/text.h"

namespace attnserve::grpc {

namespace {

constexpr std::size_t kStep = 64U << 10;
constexpr std::size_t kOwnMemory = 48U << 10;  // zlib: a window of 32 KiB and some state
constexpr int kWindowBits = 15;
constexpr int kGzipWrapper = 16;

[[noreturn]] void throw_broken(std::string_view what) {
  throw RequestError(Code::kInternal, text("message: ", what));
}

}  // namespace

Inflater::Inflater(Encoding encoding, ByteBudget& budget, std::size_t max_message_bytes)
    : charge_(budget), max_message_bytes_(max_message_bytes) {
  charge_.grow_or_throw(kOwnMemory);
  const int bits = encoding == Encoding::kGzip ? kWindowBits + kGzipWrapper : kWindowBits;
  if (inflateInit2(&stream_, bits) != Z_OK) {
    throw RequestError(Code::kResourceExhausted, "memory: none is left for this request");
  }
}

void Inflater::take(ByteSpan compressed, MessageBuffer& into) {
  // zlib's interface is older than const; it does not write there.
  stream_.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(compressed.data()));
  stream_.avail_in = static_cast<uInt>(compressed.size());  // of one DATA frame: below 16 MiB
  while (step(into)) {
  }
  if (stream_.avail_in > 0) throw_broken("bytes follow the end of its compressed stream");
}

bool Inflater::step(MessageBuffer& into) {
  if (ended_) return false;
  // One byte beyond the allowed size tells a message of just that size from a larger one.
  std::array<std::byte, 1> beyond;
  const bool full = into.size() == max_message_bytes_;
  if (!full && into.room().empty()) {
    into.reserve(std::min(max_message_bytes_, std::max(kStep, 2 * into.capacity())));
  }
  const MutableByteSpan room = full ? MutableByteSpan(beyond) : into.room();
  const std::size_t offered = std::min(room.size(), kStep);
  stream_.next_out = reinterpret_cast<Bytef*>(room.data());
  stream_.avail_out = static_cast<uInt>(offered);
  const int result = inflate(&stream_, Z_NO_FLUSH);
  const std::size_t produced = offered - stream_.avail_out;
  if (full && produced > 0) {
    throw RequestError(Code::kResourceExhausted,
                       text("Received message larger than max (inflated beyond ",
                            max_message_bytes_, " vs. ", max_message_bytes_, ")"));
  }
  if (!full) {
    into.charge(produced);
    into.filled(produced);
  }
  ended_ = result == Z_STREAM_END;
  if (result == Z_MEM_ERROR) {
    throw RequestError(Code::kResourceExhausted, "memory: none is left for this request");
  }
  if (!ended_ && result != Z_OK && result != Z_BUF_ERROR) {
    throw_broken("given bytes that are not compressed as grpc-encoding says");
  }
  return !ended_ && stream_.avail_out == 0;
}

}  // namespace attnserve::grpc
