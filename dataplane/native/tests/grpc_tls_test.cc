// TLS on real sockets, with a client of OpenSSL's own.
#include <doctest/doctest.h>
#include <openssl/err.h>
#include <openssl/ssl.h>

#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "grpc/certificate_names.h"
#include "grpc_certificates.h"
#include "grpc_sockets.h"

using namespace attnserve;
using namespace attnserve::grpc;
using namespace std::chrono_literals;

namespace {

constexpr std::string_view kHttp2("\x02h2", 3);

struct ClientOptions {
  const TestIdentity* authority = nullptr;
  const TestIdentity* identity = nullptr;  // shown if asked for
  std::string_view protocols = kHttp2;
  int newest = TLS1_3_VERSION;
};

class TlsClient {
 public:
  TlsClient(const std::string& address, const ClientOptions& options)
      : socket_(address), context_(SSL_CTX_new(TLS_client_method())) {
    SSL_CTX* it = context_.get();
    SSL_CTX_set_max_proto_version(it, options.newest);
    SSL_CTX_set_security_level(it, options.newest < TLS1_2_VERSION ? 0 : 1);
    if (options.authority != nullptr) {
      X509_STORE_add_cert(SSL_CTX_get_cert_store(it), options.authority->x509());
      SSL_CTX_set_verify(it, SSL_VERIFY_PEER, nullptr);
    }
    if (options.identity != nullptr) {
      SSL_CTX_use_certificate(it, options.identity->x509());
      SSL_CTX_use_PrivateKey(it, options.identity->private_key());
    }
    ssl_.reset(SSL_new(it));
    if (!options.protocols.empty()) {
      SSL_set_alpn_protos(ssl_.get(),
                          reinterpret_cast<const unsigned char*>(options.protocols.data()),
                          static_cast<unsigned>(options.protocols.size()));
    }
    SSL_set_fd(ssl_.get(), socket_.get());
  }

  bool shake_hands() { return SSL_connect(ssl_.get()) == 1; }
  bool send(std::string_view bytes) {
    return SSL_write(ssl_.get(), bytes.data(), static_cast<int>(bytes.size())) > 0;
  }
  std::string receive(std::size_t size) {
    std::string got(size, '\0');
    std::size_t have = 0;
    while (have < size) {
      const int more = SSL_read(ssl_.get(), got.data() + have, static_cast<int>(size - have));
      if (more <= 0) break;
      have += static_cast<std::size_t>(more);
    }
    got.resize(have);
    return got;
  }
  std::string version() { return SSL_get_version(ssl_.get()); }
  bool renew_keys() { return SSL_key_update(ssl_.get(), SSL_KEY_UPDATE_REQUESTED) == 1; }
  Client& socket() { return socket_; }
  // Whether hands can be shaken and a byte goes there and back.
  bool is_served() { return shake_hands() && send("x") && receive(1) == "x"; }
  static std::string reason() {
    const char* reason = ERR_reason_error_string(ERR_get_error());
    ERR_clear_error();
    return reason != nullptr ? reason : "";
  }

 private:
  Client socket_;
  std::unique_ptr<SSL_CTX, OpensslFree<SSL_CTX, SSL_CTX_free>> context_;
  std::unique_ptr<SSL, OpensslFree<SSL, SSL_free>> ssl_;
};

struct TlsEcho {
  explicit TlsEcho(bool mutual = false, ServerOptions options = {}) {
    options.addresses = {"127.0.0.1:0"};
    options.tls = TlsOptions{identity.certificate() + authority.certificate(), identity.key(),
                             mutual ? authority.certificate() : ""};
    server = server_of(service, echo_factory(record), std::move(options));
    server->start();
    address = server->addresses().front();
  }
  ClientOptions trusting() const { return {.authority = &authority}; }

  TestIdentity authority;
  TestIdentity identity{&authority};
  NoService service;
  EchoRecord record;
  std::unique_ptr<Server> server;
  std::string address;
};

std::string refusal_of(const TlsOptions& tls) {
  NoService service;
  EchoRecord record;
  ServerOptions options;
  options.addresses = {"127.0.0.1:0"};
  options.tls = tls;
  try {
    server_of(service, echo_factory(record), options);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("TLS 1.2 and 1.3 are served, older ones are not") {
  TlsEcho echo;
  for (const int version : {TLS1_2_VERSION, TLS1_3_VERSION}) {
    ClientOptions options = echo.trusting();
    options.newest = version;
    TlsClient client(echo.address, options);
    CHECK(client.is_served());
    CHECK(client.version() == (version == TLS1_2_VERSION ? "TLSv1.2" : "TLSv1.3"));
  }
  ClientOptions old = echo.trusting();
  old.newest = TLS1_1_VERSION;
  CHECK_FALSE(TlsClient(echo.address, old).shake_hands());
}

TEST_CASE("without HTTP/2 among its protocols nobody is served") {
  TlsEcho echo;
  for (const std::string_view protocols :
       {std::string_view("\x08http/1.1", 9), std::string_view()}) {
    ClientOptions options = echo.trusting();
    options.protocols = protocols;
    TlsClient client(echo.address, options);
    CHECK_FALSE(client.is_served());
  }
  ClientOptions several = echo.trusting();
  several.protocols = std::string_view("\x08http/1.1\x02h2", 12);
  CHECK(TlsClient(echo.address, several).is_served());
  const std::scoped_lock lock(echo.record.mutex);
  CHECK(echo.record.peers.size() == 1);
}

TEST_CASE("mutual TLS serves those whom its authority signed") {
  TlsEcho echo(true);
  const TestIdentity friendly(&echo.authority);
  const TestIdentity other_authority;
  const TestIdentity stranger(&other_authority);
  ClientOptions options = echo.trusting();
  options.identity = &friendly;
  CHECK(TlsClient(echo.address, options).is_served());

  TlsClient nobody(echo.address, echo.trusting());
  CHECK_FALSE(nobody.is_served());
  // The reason comes through, though it comes after the client has begun to talk.
  CHECK(TlsClient::reason().find("certificate required") != std::string::npos);

  options.identity = &stranger;
  TlsClient unknown(echo.address, options);
  CHECK_FALSE(unknown.is_served());
  CHECK(TlsClient::reason().find("unknown ca") != std::string::npos);
  const std::scoped_lock lock(echo.record.mutex);
  CHECK(echo.record.peers.size() == 1);
}

TEST_CASE("megabytes come back whole through TLS, also to callers who read late") {
  TlsEcho echo;
  echo.record.most_unsent = 64U << 20;
  std::string sent;
  for (std::size_t i = 0; i < (9U << 20); ++i) sent += static_cast<char>('a' + i % 23);
  TlsClient client(echo.address, echo.trusting());
  REQUIRE(client.shake_hands());
  for (std::size_t at = 0; at < sent.size(); at += 1U << 20) {
    REQUIRE(client.send(std::string_view(sent).substr(at, 1U << 20)));
  }
  std::this_thread::sleep_for(50ms);
  CHECK(client.receive(sent.size()) == sent);
}

TEST_CASE("keys may be renewed at any time") {
  TlsEcho echo;
  TlsClient client(echo.address, echo.trusting());
  REQUIRE(client.is_served());
  for (int i = 0; i < 20; ++i) {
    REQUIRE(client.renew_keys());
    REQUIRE(client.send("again"));
    CHECK(client.receive(5) == "again");
  }
}

TEST_CASE("a connection over TLS ends with a word of its own") {
  TlsEcho echo;
  TlsClient client(echo.address, echo.trusting());
  REQUIRE(client.shake_hands());
  CHECK(client.send("bye!"));
  CHECK(client.receive(100) == "bye!");
  CHECK(client.reason().empty());  // no "unexpected eof"
}

TEST_CASE("a handshake that does not come to its end is given up in time") {
  ServerOptions options;
  options.connection.header_timeout = 150ms;
  TlsEcho echo(false, options);
  Client silent(echo.address);
  Client slow(echo.address);
  slow.send("\x16\x03\x01");
  CHECK(silent.at_end());
  CHECK(slow.at_end());
  CHECK(TlsClient(echo.address, echo.trusting()).is_served());
}

TEST_CASE("what is no TLS costs its connection alone") {
  TlsEcho echo;
  TlsClient good(echo.address, echo.trusting());
  REQUIRE(good.is_served());
  Client plain(echo.address);
  plain.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + std::string(100000, '\0'));
  CHECK(plain.receive(1000).size() < 1000);
  CHECK(good.send("y"));
  CHECK(good.receive(1) == "y");
}

TEST_CASE("a drain ends handshakes under way") {
  TlsEcho echo;
  Client silent(echo.address);
  CHECK(eventually([&] { return echo.server->connections() == 1; }));
  CHECK(echo.server->drain(5s));
  CHECK(silent.at_end());
}

TEST_CASE("certificates and keys that are of no use are refused by field, without their text") {
  const TestIdentity authority;
  const TestIdentity identity(&authority);
  const TestIdentity other(&authority);
  CHECK(refusal_of({"", identity.key(), ""}) == "TLS certificate_chain: no certificate in it");
  CHECK(refusal_of({"rubbish", identity.key(), ""}) ==
        "TLS certificate_chain: no certificate in it");
  std::string damaged = identity.certificate();
  damaged[100] = '*';
  CHECK(refusal_of({damaged, identity.key(), ""}).starts_with("TLS certificate_chain: "));
  CHECK(refusal_of({identity.certificate(), "", ""}).starts_with("TLS private_key: "));
  CHECK(refusal_of({identity.certificate(), other.key(), ""}) ==
        "TLS private_key: key values mismatch");
  const std::string encrypted = refusal_of({identity.certificate(), identity.encrypted_key(), ""});
  CHECK(encrypted.starts_with("TLS private_key: "));
  CHECK(encrypted.size() < 100);
  CHECK(refusal_of({identity.certificate(), identity.key(), "rubbish"}) ==
        "TLS client_authorities: no certificate in it");
}

TEST_CASE("certificates are replaced for those who come, and those who are there go on") {
  TlsEcho echo(true);
  const TestIdentity friendly(&echo.authority);
  ClientOptions options = echo.trusting();
  options.identity = &friendly;
  TlsClient early(echo.address, options);
  REQUIRE(early.is_served());

  const TestIdentity new_authority;
  const TestIdentity new_identity(&new_authority);
  const TestIdentity new_friend(&new_authority);
  CHECK_THROWS_AS(echo.server->replace_tls({new_identity.certificate(), echo.identity.key(),
                                            new_authority.certificate()}),
                  std::runtime_error);
  CHECK(TlsClient(echo.address, options).is_served());  // nothing has changed
  echo.server->replace_tls(
      {new_identity.certificate(), new_identity.key(), new_authority.certificate()});

  CHECK(early.send("on"));
  CHECK(early.receive(2) == "on");
  CHECK_FALSE(TlsClient(echo.address, options).is_served());
  ClientOptions renewed{.authority = &new_authority, .identity = &new_friend};
  CHECK(TlsClient(echo.address, renewed).is_served());
  renewed.identity = &friendly;  // whom the old authority signed
  CHECK_FALSE(TlsClient(echo.address, renewed).is_served());
}

TEST_CASE("certificates are replaced while others shake hands") {
  TlsEcho echo;
  std::atomic<bool> over{false};
  std::thread replacing([&] {
    while (!over) {
      echo.server->replace_tls({echo.identity.certificate(), echo.identity.key(), ""});
    }
  });
  for (int i = 0; i < 50; ++i) CHECK(TlsClient(echo.address, echo.trusting()).is_served());
  over = true;
  replacing.join();
}

TEST_CASE("a certificate's names, the most telling first") {
  const TestIdentity authority;
  const TestIdentity identity(&authority);
  std::vector<std::string> names = names_of(*identity.x509());
  REQUIRE(names.size() == 2);  // the common name is the host's
  CHECK(names[0] == "localhost");
  CHECK(names[1].starts_with("sha256:"));
  CHECK(names[1].size() == 71);
  X509* it = identity.x509();
  X509_EXTENSION* extension =
      X509V3_EXT_conf_nid(nullptr, nullptr, NID_subject_alt_name,
                          "DNS:a.example,URI:spiffe://example/a,email:a@example,IP:127.0.0.1");
  X509_EXTENSION_free(X509_delete_ext(it, X509_get_ext_by_NID(it, NID_subject_alt_name, -1)));
  X509_add_ext(it, extension, -1);
  X509_EXTENSION_free(extension);
  names = names_of(*it);
  names.pop_back();
  CHECK(names ==
        std::vector<std::string>{"spiffe://example/a", "localhost", "a.example", "a@example"});
}
