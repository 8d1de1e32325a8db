#include "grpc/tls.h"

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>

#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

#include "base/text.h"
#include "grpc/openssl_pointers.h"
#include "grpc/tls_transport.h"

namespace attnserve::grpc {
namespace {

constexpr std::size_t kReadAheadBytes = 64 * 1024;  // asked of the socket at once

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

ContextPointer context_of(const TlsOptions& options) {
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
  return context;
}

class OpensslContext final : public TlsContext, private Trust {
 public:
  explicit OpensslContext(ContextPointer context) : context_(std::move(context)) {}

  void replace(const TlsOptions& options) override {
    ContextPointer context = context_of(options);  // the old one goes with the last connection
    const std::lock_guard lock(mutex_);
    context_.swap(context);
    ++generation_;
  }

  std::unique_ptr<Transport> accept(Descriptor socket) const override {
    const std::lock_guard lock(mutex_);
    return tls_transport(std::move(socket), *context_, *this, generation_);
  }

 private:
  std::uint64_t generation() const override {
    const std::lock_guard lock(mutex_);
    return generation_;
  }

  bool trusts(X509& certificate, STACK_OF(X509) * chain) const override {
    const ContextPointer context = current();
    if ((SSL_CTX_get_verify_mode(context.get()) & SSL_VERIFY_PEER) == 0) return true;
    const StoreContextPointer check(X509_STORE_CTX_new());
    if (!check || X509_STORE_CTX_init(check.get(), SSL_CTX_get_cert_store(context.get()),
                                      &certificate, chain) != 1) {
      throw std::bad_alloc();
    }
    X509_STORE_CTX_set_default(check.get(), "ssl_client");
    const bool good = X509_verify_cert(check.get()) == 1;
    ERR_clear_error();
    return good;
  }

  ContextPointer current() const {
    const std::lock_guard lock(mutex_);
    SSL_CTX_up_ref(context_.get());
    return ContextPointer(context_.get());
  }

  mutable std::mutex mutex_;  // guards what follows; each connection has a count on its context_
  ContextPointer context_;
  std::uint64_t generation_ = 0;
};

}  // namespace

std::unique_ptr<TlsContext> TlsContext::create(const TlsOptions& options) {
  return std::make_unique<OpensslContext>(context_of(options));
}

}  // namespace attnserve::grpc
