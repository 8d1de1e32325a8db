// Certificates for tests, made on the spot.
#pragma once

#include <openssl/bio.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <openssl/x509v3.h>

#include <memory>
#include <string>

namespace attnserve::grpc {

template <class T, void (*function)(T*)>
struct OpensslFree {
  void operator()(T* object) const { function(object); }
};
using TestKey = std::unique_ptr<EVP_PKEY, OpensslFree<EVP_PKEY, EVP_PKEY_free>>;
using TestCertificate = std::unique_ptr<X509, OpensslFree<X509, X509_free>>;

template <class Write>
std::string pem_of(Write write) {
  BIO* bio = BIO_new(BIO_s_mem());
  write(bio);
  char* bytes = nullptr;
  const long size = BIO_get_mem_data(bio, &bytes);
  std::string pem(bytes, static_cast<std::size_t>(size));
  BIO_free(bio);
  return pem;
}

// A key and a certificate for "localhost", signed by an issuer or by itself.
class TestIdentity {
 public:
  explicit TestIdentity(const TestIdentity* issuer = nullptr)
      : key_(EVP_EC_gen("P-256")), certificate_(X509_new()) {
    X509* it = certificate_.get();
    static long serial = 0;
    X509_set_version(it, 2);
    ASN1_INTEGER_set(X509_get_serialNumber(it), ++serial);
    X509_gmtime_adj(X509_getm_notBefore(it), -3600);
    X509_gmtime_adj(X509_getm_notAfter(it), 3600);
    X509_set_pubkey(it, key_.get());
    const std::string name =
        issuer != nullptr ? "localhost" : "authority " + std::to_string(serial);
    X509_NAME_add_entry_by_txt(X509_get_subject_name(it), "CN", MBSTRING_ASC,
                               reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0);
    const TestIdentity& signer = issuer != nullptr ? *issuer : *this;
    X509_set_issuer_name(it, X509_get_subject_name(signer.certificate_.get()));
    extend(NID_basic_constraints, issuer != nullptr ? "CA:FALSE" : "critical,CA:TRUE");
    if (issuer != nullptr) extend(NID_subject_alt_name, "DNS:localhost,IP:127.0.0.1");
    X509_sign(it, signer.key_.get(), EVP_sha256());
  }

  std::string certificate() const {
    return pem_of([&](BIO* bio) { PEM_write_bio_X509(bio, certificate_.get()); });
  }
  std::string key() const {
    return pem_of([&](BIO* bio) {
      PEM_write_bio_PrivateKey(bio, key_.get(), nullptr, nullptr, 0, nullptr, nullptr);
    });
  }
  std::string encrypted_key() const {
    return pem_of([&](BIO* bio) {
      PEM_write_bio_PrivateKey(bio, key_.get(), EVP_aes_256_cbc(), nullptr, 0, nullptr,
                               const_cast<char*>("password"));
    });
  }
  X509* x509() const { return certificate_.get(); }
  EVP_PKEY* private_key() const { return key_.get(); }

 private:
  void extend(int extension, const char* value) {
    X509_EXTENSION* made = X509V3_EXT_conf_nid(nullptr, nullptr, extension, value);
    X509_add_ext(certificate_.get(), made, -1);
    X509_EXTENSION_free(made);
  }

  TestKey key_;
  TestCertificate certificate_;
};

}  // namespace attnserve::grpc
