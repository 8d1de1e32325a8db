#include "grpc/certificate_names.h"

#include <openssl/evp.h>
#include <openssl/x509v3.h>

#include <algorithm>
#include <array>
#include <memory>
#include <new>
#include <span>
#include <string_view>
#include <utility>

namespace attnserve::grpc {
namespace {

constexpr std::size_t kMostBytes = 256;

struct FreeNames {
  void operator()(GENERAL_NAMES* names) const { GENERAL_NAMES_free(names); }
};

void add(std::vector<std::string>& names, const ASN1_STRING* given) {
  if (given == nullptr) return;
  const std::string_view text(reinterpret_cast<const char*>(ASN1_STRING_get0_data(given)),
                              static_cast<std::size_t>(ASN1_STRING_length(given)));
  const auto printable = [](char c) { return c >= 0x20 && c < 0x7F; };
  if (text.empty() || text.size() > kMostBytes || !std::ranges::all_of(text, printable)) return;
  if (std::ranges::find(names, text) == names.end()) names.emplace_back(text);
}

// "sha256:" and the digest of the whole certificate: each has that.
std::string fingerprint(const X509& certificate) {
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest;
  unsigned size = 0;
  if (X509_digest(&certificate, EVP_sha256(), digest.data(), &size) != 1) throw std::bad_alloc();
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string name = "sha256:";
  for (const unsigned char byte : std::span(digest).first(size)) {
    name += kDigits[byte >> 4U];
    name += kDigits[byte & 0xFU];
  }
  return name;
}

}  // namespace

std::vector<std::string> names_of(const X509& certificate) {
  std::vector<std::string> names;
  const std::unique_ptr<GENERAL_NAMES, FreeNames> others(static_cast<GENERAL_NAMES*>(
      X509_get_ext_d2i(&certificate, NID_subject_alt_name, nullptr, nullptr)));
  const auto add_all = [&](int kind) {
    const int count = others ? sk_GENERAL_NAME_num(others.get()) : 0;
    for (int at = 0; at < count; ++at) {
      const GENERAL_NAME* each = sk_GENERAL_NAME_value(others.get(), at);
      if (each->type == kind) add(names, each->d.ia5);
    }
  };
  add_all(GEN_URI);
  const X509_NAME* subject = X509_get_subject_name(&certificate);
  const int at = X509_NAME_get_index_by_NID(subject, NID_commonName, -1);
  if (at >= 0) add(names, X509_NAME_ENTRY_get_data(X509_NAME_get_entry(subject, at)));
  add_all(GEN_DNS);
  add_all(GEN_EMAIL);
  names.push_back(fingerprint(certificate));
  return names;
}

}  // namespace attnserve::grpc
