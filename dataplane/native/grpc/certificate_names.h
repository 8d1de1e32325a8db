// What a certificate calls its holder.
#pragma once

#include <openssl/x509.h>

#include <string>
#include <vector>

namespace attnserve::grpc {

// The most telling first: names that are URIs (as SPIFFE has them), the common name, names of
// hosts, addresses of mail, and "sha256:" with the digest of the certificate. What is empty, longer
// than 256 bytes or has other than printable ASCII is left out.
std::vector<std::string> names_of(const X509& certificate);

}  // namespace attnserve::grpc
