#include "grpc/tls.h"

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

#include "base/text.h"

namespace attnserve::grpc {
namespace {

constexpr std::size_t kRecordBytes = 16384;         // the most that one TLS record carries
constexpr std::size_t kUnsentBytes = 64 * 1024;     // encrypted ahead of the socket
constexpr std::size_t kRecordOverhead = 64;         // more than any cipher adds to a record
constexpr std::size_t kReadAheadBytes = 64 * 1024;  // asked of the socket at once

template <auto function>
struct Freeing {
  template <class T>
  void operator()(T* object) const {
    function(object);
  }
};
using ContextPointer = std::unique_ptr<SSL_CTX, Freeing<SSL_CTX_free>>;
using SslPointer = std::unique_ptr<SSL, Freeing<SSL_free>>;
using BioPointer = std::unique_ptr<BIO, Freeing<BIO_free>>;
using CertificatePointer = std::unique_ptr<X509, Freeing<X509_free>>;
using KeyPointer = std::unique_ptr<EVP_PKEY, Freeing<EVP_PKEY_free>>;

// What OpenSSL calls the last failure: words of its own, nothing of what it read.
std::string last_reason() {
  const char* reason = ERR_reason_error_string(ERR_peek_last_error());
  ERR_clear_error();
  return reason != nullptr ? reason : "unknown reason";
}

[[noreturn]] void refuse(std::string_view field, std::string_view reason) {
  throw std::runtime_error(text("TLS ", field, ": ", reason));
}

BioPointer reader_of(const std::string& pem) {
  BioPointer bio(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
  if (!bio) throw std::bad_alloc();
  return bio;
}

// An encrypted key is refused instead of asking a terminal for its password.
int no_password(char*, int, int, void*) { return 0; }

std::vector<CertificatePointer> certificates_of(const std::string& pem, std::string_view field) {
  const BioPointer bio = reader_of(pem);
  std::vector<CertificatePointer> found;
  ERR_clear_error();
  while (X509* each = PEM_read_bio_X509(bio.get(), nullptr, no_password, nullptr)) {
    found.emplace_back(each);
  }
  const bool at_end = ERR_GET_REASON(ERR_peek_last_error()) == PEM_R_NO_START_LINE;
  if (!at_end) refuse(field, last_reason());
  ERR_clear_error();
  if (found.empty()) refuse(field, "no certificate in it");
  return found;
}

void use_certificate_chain(SSL_CTX& context, const std::string& pem) {
  constexpr std::string_view kField = "certificate_chain";
  std::vector<CertificatePointer> chain = certificates_of(pem, kField);
  if (SSL_CTX_use_certificate(&context, chain.front().get()) != 1) refuse(kField, last_reason());
  for (std::size_t i = 1; i < chain.size(); ++i) {
    if (SSL_CTX_add1_chain_cert(&context, chain[i].get()) != 1) refuse(kField, last_reason());
  }
}

void use_private_key(SSL_CTX& context, const std::string& pem) {
  constexpr std::string_view kField = "private_key";
  const BioPointer bio = reader_of(pem);
  const KeyPointer key(PEM_read_bio_PrivateKey(bio.get(), nullptr, no_password, nullptr));
  if (!key) refuse(kField, last_reason());
  if (SSL_CTX_use_PrivateKey(&context, key.get()) != 1 ||
      SSL_CTX_check_private_key(&context) != 1) {
    refuse(kField, last_reason());
  }
}

void require_client_certificates(SSL_CTX& context, const std::string& pem) {
  constexpr std::string_view kField = "client_authorities";
  for (const CertificatePointer& authority : certificates_of(pem, kField)) {
    if (X509_STORE_add_cert(SSL_CTX_get_cert_store(&context), authority.get()) != 1 ||
        SSL_CTX_add_client_CA(&context, authority.get()) != 1) {
      refuse(kField, last_reason());
    }
  }
  SSL_CTX_set_verify(&context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
}

int choose_protocol(SSL*, const unsigned char** chosen, unsigned char* chosen_size,
                    const unsigned char* offered, unsigned offered_size, void*) {
  for (unsigned at = 0; at < offered_size; at += 1U + offered[at]) {
    if (offered[at] == 2 && at + 2 < offered_size && std::memcmp(offered + at + 1, "h2", 2) == 0) {
      *chosen = offered + at + 1;
      *chosen_size = 2;
      return SSL_TLSEXT_ERR_OK;
    }
  }
  return SSL_TLSEXT_ERR_ALERT_FATAL;
}

// The socket's side of an SSL object: reads come straight from the socket, writes are collected, so
// that many records leave in one call.
class TlsTransport final : public Transport {
 public:
  TlsTransport(Descriptor socket, SSL_CTX& context);

  ReadResult read(MutableByteSpan into) override;
  WriteResult write(std::span<const iovec> pieces) override;
  bool has_unsent() const override { return sent_ < unsent_.size(); }
  bool established() const override { return established_; }
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

const BIO_METHOD& bio_method() {
  static const std::unique_ptr<BIO_METHOD, Freeing<BIO_meth_free>> method = [] {
    std::unique_ptr<BIO_METHOD, Freeing<BIO_meth_free>> made(
        BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "attnserve"));
    if (!made) throw std::bad_alloc();
    BIO_meth_set_write(made.get(), bio_write);
    BIO_meth_set_read(made.get(), bio_read);
    BIO_meth_set_ctrl(made.get(), bio_control);
    return made;
  }();
  return *method;
}

TlsTransport::TlsTransport(Descriptor socket, SSL_CTX& context)
    : Transport(std::move(socket)), ssl_(SSL_new(&context)) {
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

void TlsTransport::end_output() {
  if (established_ && !broken_) {
    SSL_shutdown(ssl_.get());
    ERR_clear_error();
  }
  if (has_unsent()) send_unsent();
  Transport::end_output();
}

class OpensslContext final : public TlsContext {
 public:
  explicit OpensslContext(ContextPointer context) : context_(std::move(context)) {}

  std::unique_ptr<Transport> accept(Descriptor socket) const override {
    return std::make_unique<TlsTransport>(std::move(socket), *context_);
  }

 private:
  ContextPointer context_;
};

}  // namespace

std::unique_ptr<TlsContext> TlsContext::create(const TlsOptions& options) {
  ContextPointer context(SSL_CTX_new(TLS_server_method()));
  if (!context) throw std::bad_alloc();
  SSL_CTX& it = *context;
  SSL_CTX_set_min_proto_version(&it, TLS1_2_VERSION);
  // Of TLS 1.2 only what RFC 9113, appendix A, leaves to HTTP/2.
  SSL_CTX_set_cipher_list(&it, "ECDHE+AESGCM:ECDHE+CHACHA20");
  SSL_CTX_set_options(&it, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
  SSL_CTX_set_session_cache_mode(&it, SSL_SESS_CACHE_OFF);
  constexpr std::string_view kSessions = "attnserve";  // tickets of ours are good for nobody else
  SSL_CTX_set_session_id_context(&it, reinterpret_cast<const unsigned char*>(kSessions.data()),
                                 static_cast<unsigned>(kSessions.size()));
  // Idle connections keep no buffers.
  SSL_CTX_set_mode(&it, SSL_MODE_RELEASE_BUFFERS);
  SSL_CTX_set_read_ahead(&it, 1);
  SSL_CTX_set_default_read_buffer_len(&it, kReadAheadBytes);
  SSL_CTX_set_alpn_select_cb(&it, choose_protocol, nullptr);
  use_certificate_chain(it, options.certificate_chain);
  use_private_key(it, options.private_key);
  if (!options.client_authorities.empty()) {
    require_client_certificates(it, options.client_authorities);
  }
  return std::make_unique<OpensslContext>(std::move(context));
}

}  // namespace attnserve::grpc
