// What the server accepts; sizes in bytes. Each is an option of attnserve-server.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/clock.h"

namespace attnserve::requests {

struct Limits {
  std::size_t max_message_bytes = 128U << 20;       // one gRPC message
  std::size_t max_request_bytes = 1024U << 20;      // all tensors of one request
  std::size_t max_response_bytes = 1024U << 20;     // all tensors of one answer
  std::size_t max_bytes_in_flight = 4096ULL << 20;  // requests and answers together
  std::size_t max_working_bytes = 8192ULL << 20;    // of one computation, estimated; also of all
  std::int64_t max_seq_len = 65536;                 // Sq and Sk
  std::int64_t max_batch = 1024;                    // sequences of one request
  std::size_t max_stream_requests = 32;             // in flight on one stream
  std::size_t chunk_bytes = 1U << 20;               // of the chunks that the server sends
};

}  // namespace attnserve::requests
