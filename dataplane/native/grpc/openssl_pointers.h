// Owners of OpenSSL's objects.
#pragma once

#include <openssl/bio.h>
#include <openssl/evp.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>

#include <memory>

namespace attnserve::grpc {

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
using BioMethodPointer = std::unique_ptr<BIO_METHOD, Freeing<BIO_meth_free>>;
using CertificatePointer = std::unique_ptr<X509, Freeing<X509_free>>;
using StoreContextPointer = std::unique_ptr<X509_STORE_CTX, Freeing<X509_STORE_CTX_free>>;
using KeyPointer = std::unique_ptr<EVP_PKEY, Freeing<EVP_PKEY_free>>;

}  // namespace attnserve::grpc
