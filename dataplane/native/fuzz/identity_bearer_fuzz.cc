// Authorization headers of any bytes: a token is found within them or not at all, and nobody is
// recognized who did not show one that is known.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "identity/callers.h"

namespace attnserve::identity {
namespace {

constexpr std::string_view kToken = "attn_known";

Callers& callers() {
  static ByteBudget budget(1 << 20);
  static Callers* known = [] {
    auto* made = new Callers({.required = true, .web_tokens = true}, budget);
    const Digest digest = sha256(kToken);
    made->replace({{"fuzz", kInfer, "sha256", std::string(digest.begin(), digest.end()), {}}});
    return made;
  }();
  return *known;
}

void require(bool condition) {
  if (!condition) std::abort();
}

}  // namespace
}  // namespace attnserve::identity

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace attnserve;
  using namespace attnserve::identity;
  const std::string_view header(reinterpret_cast<const char*>(data), size);
  const auto token = bearer_token(header);
  if (token) {
    require(token->data() > header.data() && header.ends_with(*token));
    require(token->find_first_of(" ,\r\n\t") == std::string_view::npos && !token->empty());
  }
  const Verdict verdict = callers().recognize(header, {});
  const bool known = std::holds_alternative<Recognized>(verdict);
  require(known == (token == kToken));
  if (const auto* refused = std::get_if<Status>(&verdict)) {
    require(refused->code == Code::kUnauthenticated);
    // One of the sentences that there are: nothing of the header is repeated.
    require(refused->message == unauthenticated("nothing").message ||
            refused->message == unauthenticated("what is no Bearer token").message ||
            refused->message == unauthenticated("a token that it does not know").message);
  }
  if (std::holds_alternative<Unchecked>(verdict)) require(token && !known);
  return 0;
}
