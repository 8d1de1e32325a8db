#include <doctest/doctest.h>

#include <string>
#include <thread>
#include <vector>

#include "identity/callers.h"

namespace attnserve::identity {
namespace {

constexpr std::size_t kMib = std::size_t{1} << 20;

std::string digest_of(const std::string& token) {
  const Digest digest = sha256(token);
  return {digest.begin(), digest.end()};
}

Known known(const std::string& name, Roles roles, const std::string& token, Bounds bounds = {}) {
  return {name, roles, "sha256", digest_of(token), bounds};
}

Known certified(const std::string& name, Roles roles, const std::string& certificate) {
  return {name, roles, "certificate", certificate, {}};
}

struct Fixture {
  explicit Fixture(CallersOptions options = {.required = true}) : callers(options, budget) {}

  ByteBudget budget{64 * kMib};
  Callers callers;

  std::optional<Recognized> recognized(const std::string& authorization,
                                       const std::vector<std::string>& certificate = {}) {
    Verdict verdict = callers.recognize(authorization, certificate);
    if (auto* found = std::get_if<Recognized>(&verdict)) return *found;
    return std::nullopt;
  }
  Status refusal(const std::string& authorization,
                 const std::vector<std::string>& certificate = {}) {
    return std::get<Status>(callers.recognize(authorization, certificate));
  }
};

}  // namespace

TEST_CASE("SHA-256 is that of FIPS 180-4") {
  const Digest digest = sha256("abc");
  CHECK(digest[0] == 0xBA);
  CHECK(digest[1] == 0x78);
  CHECK(digest[31] == 0xAD);
}

TEST_CASE("a bearer token is what RFC 6750 says") {
  CHECK(bearer_token("Bearer abc") == "abc");
  CHECK(bearer_token("bearer a-._~+/9==") == "a-._~+/9==");
  CHECK(bearer_token("BEARER   abc") == "abc");
  for (const char* wrong : {"", "Bearer", "Bearer ", "Bearerabc", "Basic abc", "Bearer a b",
                            "Bearer a,b", "Bearer ==", "Bearer a=b", "Bearer \t", "Bearer a\x80",
                            "Bearer abc, Bearer abc", " Bearer abc"}) {
    CHECK_MESSAGE(!bearer_token(wrong), wrong);
  }
  CHECK(bearer_token("Bearer " + std::string(8192, 'a')));
  CHECK(!bearer_token("Bearer " + std::string(8193, 'a')));
}

TEST_CASE("a token names its caller, and no other token does") {
  Fixture it;
  it.callers.replace({known("trainer", kInfer | kSessions, "one"), known("ops", kAdmin, "two")});
  const auto trainer = it.recognized("Bearer one");
  REQUIRE(trainer);
  CHECK(trainer->caller->name == "trainer");
  CHECK(trainer->roles == (kInfer | kSessions));
  CHECK(it.recognized("Bearer two")->roles == kAdmin);
  for (const char* wrong : {"Bearer three", "Bearer On", "one", "Bearer one1", "Bearer on"}) {
    const Status refused = it.refusal(wrong);
    CHECK(refused.code == Code::kUnauthenticated);
    CHECK(refused.message.find("one1") == std::string::npos);  // nothing given is repeated
    CHECK(refused.message.find("three") == std::string::npos);
  }
  CHECK(it.refusal("").code == Code::kUnauthenticated);
  CHECK(it.callers.look_up("Bearer two")->caller->name == "ops");
  CHECK(!it.callers.look_up("Bearer three"));
}

TEST_CASE("a wrong token is not made good by a certificate") {
  Fixture it({.required = true, .certificate_roles = kInfer});
  CHECK(it.recognized("", {"a"}));
  CHECK(it.refusal("Bearer wrong", {"a"}).code == Code::kUnauthenticated);
}

TEST_CASE("certificates: a line's, by any of their names, else those of certificate_roles") {
  Fixture it({.required = true, .certificate_roles = kSessions});
  it.callers.replace({certified("edge", kInfer, "spiffe://example/edge"),
                      certified("ops", kAdmin, "ops.example")});
  CHECK(it.recognized("", {"spiffe://example/edge", "x"})->caller->name == "edge");
  CHECK(it.recognized("", {"x", "ops.example"})->caller->name == "ops");
  const auto other = it.recognized("", {"x", "y"});
  CHECK(other->caller->name == "certificate:x");  // never the name of a line
  CHECK(other->roles == kSessions);
  Fixture none;
  none.callers.replace({certified("edge", kInfer, "edge")});
  CHECK(none.recognized("", {"edge"}));
  CHECK(none.refusal("", {"x"}).code == Code::kUnauthenticated);
}

TEST_CASE("what is replaced is not known any more, and callers keep what they hold") {
  Fixture it;
  it.callers.replace({known("trainer", kInfer, "one")});
  const auto before = it.recognized("Bearer one")->caller;
  Lease held(before->in_flight);
  REQUIRE(held.grow(kMib));
  it.callers.replace({known("trainer", kAdmin, "two")});
  CHECK(it.refusal("Bearer one").code == Code::kUnauthenticated);
  const auto after = it.recognized("Bearer two");
  CHECK(after->caller == before);
  CHECK(after->roles == kAdmin);
  CHECK(after->caller->in_flight.lent() == kMib);
}

TEST_CASE("two tokens of a name are one caller") {
  Fixture it;
  it.callers.replace({known("trainer", kInfer, "one"), known("trainer", kAdmin, "two")});
  CHECK(it.recognized("Bearer one")->caller == it.recognized("Bearer two")->caller);
  CHECK(it.recognized("Bearer one")->roles == kInfer);
}

TEST_CASE("who need not say who it is, is told apart by where it calls from") {
  Fixture it(CallersOptions{});
  const auto one = it.callers.at("ipv4:10.0.0.1");
  CHECK(one.roles == kAllRoles);
  CHECK(one.caller->name.empty());
  CHECK(it.callers.at("ipv4:10.0.0.1").caller == one.caller);
  CHECK(it.callers.at("ipv4:10.0.0.2").caller != one.caller);
}

TEST_CASE("callers that hold nothing are forgotten once there are many") {
  Fixture it(CallersOptions{});
  const auto kept = it.callers.at("kept").caller;
  Lease held;
  {
    const auto busy = it.callers.at("busy").caller;
    held = Lease(busy->in_flight);
    REQUIRE(held.grow(1));
  }
  for (int i = 0; i < 20'000; ++i) it.callers.at("ipv4:" + std::to_string(i));
  CHECK(it.callers.size() <= 4097);
  CHECK(it.callers.at("kept").caller == kept);
  held.release();  // its budget is there still
  CHECK(it.budget.lent() == 0);
}

TEST_CASE("a caller's bytes are within its bound and within that of all") {
  Fixture it({.required = true, .bounds = {.bytes_in_flight = 3 * kMib}});
  it.callers.replace({known("a", kInfer, "a", {.bytes_in_flight = 3 * kMib}),
                      known("b", kInfer, "b", {.bytes_in_flight = 63 * kMib})});
  Lease a(it.recognized("Bearer a")->caller->in_flight);
  CHECK(a.grow(3 * kMib));
  CHECK(!a.grow(1));
  try {
    a.grow_or_throw(1);
    CHECK(false);
  } catch (const RequestError& error) {
    CHECK(error.status().message.find("--caller-in-flight-mib") != std::string::npos);
  }
  Lease b(it.recognized("Bearer b")->caller->in_flight);
  CHECK(!b.grow(62 * kMib));
  CHECK(b.grow(61 * kMib));
  CHECK(it.budget.lent() == 64 * kMib);
  try {
    b.grow_or_throw(1);
    CHECK(false);
  } catch (const RequestError& error) {
    CHECK(error.status().message.find("--caller") == std::string::npos);
  }
  a.release();
  CHECK(it.budget.lent() == 61 * kMib);
}

TEST_CASE("so many requests a second, and when there is room for the next") {
  Fixture it;
  it.callers.replace({known("a", kInfer, "a", {.requests_per_second = 4})});
  const auto caller = it.recognized("Bearer a")->caller;
  const TimePoint start = Clock::now();
  for (int i = 0; i < 4; ++i) CHECK(!caller->request(start));
  const auto refused = caller->request(start);
  REQUIRE(refused);
  CHECK(refused->code == Code::kResourceExhausted);
  CHECK(refused->retry_after == std::chrono::milliseconds(250));
  CHECK(caller->request(start + std::chrono::milliseconds(200)));
  CHECK(!caller->request(start + std::chrono::milliseconds(251)));
  // Idle for an hour is worth one second.
  int taken = 0;
  while (!caller->request(start + std::chrono::hours(1)) && taken < 100) ++taken;
  CHECK(taken == 4);
}

TEST_CASE("fewer than one a second is one now and then") {
  Fixture it;
  it.callers.replace({known("a", kInfer, "a", {.requests_per_second = 0.5})});
  const auto caller = it.recognized("Bearer a")->caller;
  const TimePoint start = Clock::now();
  CHECK(!caller->request(start));
  CHECK(caller->request(start + std::chrono::seconds(1)));
  CHECK(!caller->request(start + std::chrono::seconds(3)));
}

TEST_CASE("so many calls are open at once, from whichever threads") {
  Fixture it;
  it.callers.replace({known("a", kInfer, "a", {.calls = 8})});
  const auto caller = it.recognized("Bearer a")->caller;
  std::atomic<int> entered{0};
  std::vector<std::vector<OpenCall>> open(4);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (int k = 0; k < 100; ++k) {
        OpenCall call;
        if (caller->enter(Clock::now(), call)) continue;
        ++entered;
        open[static_cast<std::size_t>(i)].push_back(std::move(call));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(entered <= 8);
  CHECK(entered >= 1);
  CHECK(caller->open_calls() == static_cast<std::size_t>(entered));
  open.clear();
  CHECK(caller->open_calls() == 0);
  CHECK(caller->idle());
}

TEST_CASE("a web token is for others to check, then known until it runs out") {
  Fixture it({.required = true, .web_tokens = true});
  const std::string token = "aGVhZGVy.Y2xhaW1z.c2lnbmF0dXJl";
  const std::string shown = "Bearer " + token;  // which the verdict looks into
  const Verdict verdict = it.callers.recognize(shown, {});
  REQUIRE(std::holds_alternative<Unchecked>(verdict));
  CHECK(std::get<Unchecked>(verdict).token == token);
  const double now =
      std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  it.callers.replace({}, {"a", "b"});
  it.callers.admit(token, "jwt:alice", kInfer, now + 60, "a");
  CHECK(it.recognized("Bearer " + token)->caller->name == "jwt:alice");
  it.callers.admit(token, "jwt:alice", kInfer, now - 1, "a");
  CHECK(!it.recognized("Bearer " + token));
  it.callers.admit(token, "jwt:alice", kInfer, now + 60, "a");
  it.callers.replace({}, {"a"});
  CHECK(it.recognized("Bearer " + token));
  it.callers.replace({}, {"b"});
  CHECK(!it.recognized("Bearer " + token));  // its key is one no longer
  for (const char* wrong : {"a.b", "a.b.c.d", ".b.c", "a..c", "a.b."}) {
    CHECK(it.refusal(std::string("Bearer ") + wrong).code == Code::kUnauthenticated);
  }
  Fixture without;
  CHECK(without.refusal("Bearer " + token).code == Code::kUnauthenticated);
}

TEST_CASE("whoever was recognized is so still, until its credential is withdrawn") {
  Fixture it({.required = true, .web_tokens = true});
  const auto still = [&](const Recognized& who, std::vector<std::string> names = {}) {
    return it.callers.still(*who.caller, *who.credential, names);
  };
  const Known alice{"alice", kInfer | kAdmin, "sha256", digest_of("one"), {}};
  const Known again{"alice", kInfer, "sha256", digest_of("another"), {}};
  const Known carol = certified("carol", kInfer, "carol.example");
  it.callers.replace({alice, again, carol}, {"key"});
  const Recognized token = *it.recognized("Bearer one");
  const Recognized certificate = std::get<Recognized>(
      it.callers.recognize("", std::vector<std::string>{"x", "carol.example"}));
  const double now =
      std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  const Recognized web = it.callers.admit("a.b.c", "jwt:bob", kInfer, now + 60, "key");
  const Recognized over = it.callers.admit("a.b.d", "jwt:bob", kInfer, now - 1, "key");
  CHECK(still(token) == (kInfer | kAdmin));
  CHECK(still(certificate, {"x", "carol.example"}) == kInfer);
  CHECK(still(web));
  CHECK(!still(over));

  Known less = alice;
  less.roles = kInfer;
  it.callers.replace({less, again, carol}, {"key"});
  CHECK(still(token) == kInfer);
  // The credential of another caller now; and of no caller, whose name another credential has.
  Known other = alice;
  other.name = "bob";
  it.callers.replace({other, again, carol}, {"key"});
  CHECK(!still(token));
  it.callers.replace({again}, {"another key"});
  CHECK(!still(token));
  CHECK(!still(certificate, {"x", "carol.example"}));
  CHECK(!still(web));
}

TEST_CASE("a certificate that no line names is somebody still, unless a line names it") {
  Fixture it({.required = true, .certificate_roles = kInfer});
  const std::vector<std::string> names{"dave.example"};
  const Recognized who = std::get<Recognized>(it.callers.recognize("", names));
  CHECK(it.callers.still(*who.caller, *who.credential, names) == kInfer);
  it.callers.replace({Known{"dave", kAdmin, "certificate", "dave.example", {}}});
  CHECK(!it.callers.still(*who.caller, *who.credential, names));
  it.callers.replace({});
  CHECK(it.callers.still(*who.caller, *who.credential, names) == kInfer);
}

TEST_CASE("the bounds of a caller's sessions are known before it calls") {
  Fixture it;
  Known some = known("some", kSessions, "one");
  some.bounds.sessions = 3;
  some.bounds.session_bytes = 4096;
  it.callers.replace({some});
  CHECK(it.callers.bounds_of("@some").sessions == 3);
  CHECK(it.callers.bounds_of("@some").session_bytes == 4096);
  CHECK(it.callers.bounds_of("@else").sessions == it.callers.bounds_of("loopback").sessions);
  CHECK(it.callers.bounds_of("@else").sessions != 3);
}

}  // namespace attnserve::identity
