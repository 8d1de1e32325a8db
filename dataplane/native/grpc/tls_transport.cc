#include "grpc/tls_transport.h"

#include <openssl/bio.h>
#include <openssl/err.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "base/never_destroyed.h"
#include "grpc/certificate_names.h"
#include "grpc/openssl_pointers.h"

namespace attnserve::grpc {
namespace {

constexpr std::size_t kRecordBytes = 16384;      // the most that one TLS record carries
constexpr std::size_t kUnsentBytes = 64 * 1024;  // encrypted ahead of the socket
constexpr std::size_t kRecordOverhead = 64;      // more than any cipher adds to a record

// The socket's side of an SSL object: reads come straight from the socket, writes are collected, so
// that many records leave in one call.
class TlsTransport final : public Transport {
 public:
  TlsTransport(Descriptor socket, SSL_CTX& context, const Trust& trust, std::uint64_t generation);

  ReadResult read(MutableByteSpan into) override;
  WriteResult write(std::span<const iovec> pieces) override;
  bool has_unsent() const override { return sent_ < unsent_.size(); }
  bool established() const override { return established_; }
  std::vector<std::string> certificate_names() const override;
  bool peer_is_trusted() override;
  void end_output() override;

  // For the BIO below.
  ReadResult receive(MutableByteSpan into) { return read_from_socket(descriptor(), into); }
  bool collect(ByteSpan bytes) noexcept;

 private:
  bool shake_hands(ReadState& state);
  ReadState state_of_failure(int result);
  std::size_t encrypt(std::span<const iovec> pieces);
  WriteResult send_unsent();

  SslPointer ssl_;
  std::vector<std::byte> unsent_;  // encrypted; kept only while the socket does not take it
  std::size_t sent_ = 0;           // of `unsent_`
  bool established_ = false;
  bool broken_ = false;
  const Trust& trust_;
  std::uint64_t trusted_in_;  // the last generation in which the peer's certificate was taken
};

TlsTransport& transport_of(BIO* bio) { return *static_cast<TlsTransport*>(BIO_get_data(bio)); }

int bio_write(BIO* bio, const char* bytes, int size) {
  const ByteSpan span(reinterpret_cast<const std::byte*>(bytes), static_cast<std::size_t>(size));
  BIO_clear_retry_flags(bio);
  return transport_of(bio).collect(span) ? size : -1;
}

int bio_read(BIO* bio, char* into, int size) {
  const ReadResult got = transport_of(bio).receive(
      {reinterpret_cast<std::byte*>(into), static_cast<std::size_t>(size)});
  BIO_clear_retry_flags(bio);
  if (got.size > 0) return static_cast<int>(got.size);
  if (got.state == ReadState::kEnd) return 0;
  if (got.state == ReadState::kDrained) BIO_set_retry_read(bio);
  return -1;
}

long bio_control(BIO*, int command, long, void*) { return command == BIO_CTRL_FLUSH ? 1 : 0; }

// Kept for ever: threads that outlast main may still end connections.
const BIO_METHOD& bio_method() {
  static NeverDestroyed<BioMethodPointer> method([] {
    BioMethodPointer made(BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "attnserve"));
    if (!made) throw std::bad_alloc();
    BIO_meth_set_write(made.get(), bio_write);
    BIO_meth_set_read(made.get(), bio_read);
    BIO_meth_set_ctrl(made.get(), bio_control);
    return made;
  }());
  return **method;
}

TlsTransport::TlsTransport(Descriptor socket, SSL_CTX& context, const Trust& trust,
                           std::uint64_t generation)
    : Transport(std::move(socket)),
      ssl_(SSL_new(&context)),
      trust_(trust),
      trusted_in_(generation) {
  BIO* bio = ssl_ ? BIO_new(&bio_method()) : nullptr;
  if (bio == nullptr) throw std::bad_alloc();
  BIO_set_data(bio, this);
  BIO_set_init(bio, 1);
  SSL_set_bio(ssl_.get(), bio, bio);  // which owns it from here
  SSL_set_accept_state(ssl_.get());
}

bool TlsTransport::collect(ByteSpan bytes) noexcept {
  try {
    unsent_.insert(unsent_.end(), bytes.begin(), bytes.end());
    return true;
  } catch (const std::bad_alloc&) {
    return false;  // exceptions must not pass through OpenSSL
  }
}

// True once hands are shaken; else `state` says what to wait for.
bool TlsTransport::shake_hands(ReadState& state) {
  const int result = SSL_do_handshake(ssl_.get());
  state = result == 1 ? ReadState::kMore : state_of_failure(result);
  const unsigned char* protocol = nullptr;
  unsigned protocol_size = 0;
  if (result == 1) SSL_get0_alpn_selected(ssl_.get(), &protocol, &protocol_size);
  // A client that offers no protocol at all would talk HTTP/1 at best.
  if (result == 1 && protocol_size == 0) state = ReadState::kBroken;
  established_ = state == ReadState::kMore;
  return established_;
}

ReadState TlsTransport::state_of_failure(int result) {
  const int error = SSL_get_error(ssl_.get(), result);
  const bool cut_off = ERR_GET_REASON(ERR_peek_error()) == SSL_R_UNEXPECTED_EOF_WHILE_READING;
  ERR_clear_error();
  if (error == SSL_ERROR_WANT_READ) return ReadState::kDrained;
  if (error == SSL_ERROR_ZERO_RETURN || cut_off) return ReadState::kEnd;
  broken_ = true;
  return ReadState::kBroken;
}

ReadResult TlsTransport::read(MutableByteSpan into) {
  ERR_clear_error();
  ReadResult result{0, ReadState::kMore};
  if (established_ || shake_hands(result.state)) {
    while (result.state == ReadState::kMore && result.size < into.size()) {
      const int most = static_cast<int>(std::min(into.size() - result.size, kRecordBytes));
      const int got = SSL_read(ssl_.get(), into.data() + result.size, most);
      if (got > 0) {
        result.size += static_cast<std::size_t>(got);
      } else {
        result.state = state_of_failure(got);
      }
    }
  }
  // Reading writes too: handshakes, alerts, new keys.
  if (has_unsent() && send_unsent().broken) result.state = ReadState::kBroken;
  return result;
}

// Puts the beginning of `pieces` into records; the bytes taken.
std::size_t TlsTransport::encrypt(std::span<const iovec> pieces) {
  std::array<std::byte, kRecordBytes> joined;
  std::size_t joined_size = 0;
  std::size_t taken = 0;
  std::size_t size_of_all = 0;
  for (const iovec& piece : pieces) size_of_all += piece.iov_len;
  const std::size_t most = std::min(size_of_all, kUnsentBytes);
  unsent_.reserve(most + (most / kRecordBytes + 1) * kRecordOverhead);
  const auto put = [&](const void* bytes, std::size_t size) {
    ERR_clear_error();
    if (SSL_write(ssl_.get(), bytes, static_cast<int>(size)) <= 0) broken_ = true;
    taken += size;
  };
  for (iovec piece : pieces) {
    while (piece.iov_len > 0 && !broken_ && taken + joined_size < kUnsentBytes) {
      const std::size_t size = std::min(piece.iov_len, kRecordBytes - joined_size);
      if (size == kRecordBytes) {
        put(piece.iov_base, size);
      } else {
        std::memcpy(joined.data() + joined_size, piece.iov_base, size);
        joined_size += size;
        if (joined_size == kRecordBytes) put(joined.data(), std::exchange(joined_size, 0));
      }
      piece.iov_base = static_cast<std::byte*>(piece.iov_base) + size;
      piece.iov_len -= size;
    }
  }
  if (joined_size > 0 && !broken_) put(joined.data(), joined_size);
  ERR_clear_error();
  return taken;
}

WriteResult TlsTransport::send_unsent() {
  const iovec rest{unsent_.data() + sent_, unsent_.size() - sent_};
  WriteResult result = write_to_socket(descriptor(), {&rest, 1});
  sent_ += result.size;
  if (!has_unsent()) {
    unsent_ = {};
    sent_ = 0;
  }
  result.size = 0;
  result.broken |= broken_;
  return result;
}

WriteResult TlsTransport::write(std::span<const iovec> pieces) {
  if (has_unsent()) {
    const WriteResult result = send_unsent();
    if (result.blocked || result.broken) return result;
  }
  if (!established_ || pieces.empty()) return {0, false, broken_};
  const std::size_t taken = encrypt(pieces);
  WriteResult result = send_unsent();
  result.size = taken;
  return result;
}

std::vector<std::string> TlsTransport::certificate_names() const {
  const X509* certificate = SSL_get0_peer_certificate(ssl_.get());
  return certificate != nullptr ? names_of(*certificate) : std::vector<std::string>{};
}

bool TlsTransport::peer_is_trusted() {
  X509* certificate = SSL_get0_peer_certificate(ssl_.get());
  if (certificate == nullptr) return true;
  const std::uint64_t generation = trust_.generation();
  if (generation != trusted_in_) {
    if (!trust_.trusts(*certificate, SSL_get_peer_cert_chain(ssl_.get()))) return false;
    trusted_in_ = generation;
  }
  return X509_cmp_current_time(X509_get0_notAfter(certificate)) > 0;
}

void TlsTransport::end_output() {
  if (established_ && !broken_) {
    SSL_shutdown(ssl_.get());
    ERR_clear_error();
  }
  if (has_unsent()) send_unsent();
  Transport::end_output();
}

}  // namespace

std::unique_ptr<Transport> tls_transport(Descriptor socket, SSL_CTX& context, const Trust& trust,
                                         std::uint64_t generation) {
  return std::make_unique<TlsTransport>(std::move(socket), context, trust, generation);
}

}  // namespace attnserve::grpc
