// Messages for the tests of wire/, made and read by protobuf itself.
#pragma once

#include <doctest/doctest.h>
#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>
#include <google/protobuf/stubs/logging.h>

#include <cstdint>
#include <functional>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/memory.h"
#include "base/status.h"

namespace attnserve::wire::tests {

inline ByteSpan bytes_of(std::string_view message) {
  return std::as_bytes(std::span(message.data(), message.size()));
}
inline std::string_view text_of(ByteSpan bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}
inline std::string_view text_of(const Bytes& bytes) { return text_of(bytes.span()); }

std::string hex(std::string_view message);

// Bytes on the wire, right or wrong: what a message's fields look like in all ways that protobuf
// takes or refuses, in any order and any number.
class RandomWire {
 public:
  explicit RandomWire(std::uint64_t seed) : random_(seed) {}

  std::string message(const google::protobuf::Descriptor& type, int depth = 0);
  // With some bytes changed, left out, repeated or put in.
  std::string mutated(std::string message);

  std::uint64_t below(std::uint64_t limit) { return random_() % limit; }
  bool one_in(std::uint64_t count) { return below(count) == 0; }

 private:
  void field(const google::protobuf::FieldDescriptor& field, int depth, std::string& to);
  void unknown(int depth, std::string& to);
  std::string value(const google::protobuf::FieldDescriptor& field, int depth);
  std::string text();
  std::uint64_t number();
  void tag(std::uint32_t number, std::uint32_t wire_type, std::string& to);
  // Now and then in more bytes than it needs, which is allowed up to `most`.
  void varint(std::uint64_t value, std::size_t most, std::string& to);
  void embedded(std::uint32_t number, std::string_view body, std::string& to);

  std::mt19937_64 random_;
  google::protobuf::LogSilencer silencer_;  // protobuf has a line for each text that is not UTF-8
};

void append_varint(std::string& to, std::uint64_t value);
std::string field(std::uint32_t number, std::string_view body);  // of wire type 2
std::string repeated(std::string_view part, std::size_t bytes);  // that many or a few more
// What some work takes of this thread's processor time, in seconds, by the cheapest of a few runs:
// other processes have no part in it. Compared with the same of other work, never with a constant.
double processor_seconds_of(const std::function<void()>& work);
// The message of the INVALID_ARGUMENT that `decode` throws; empty if it throws none.
std::string refusal(const std::function<void()>& decode);

constexpr std::size_t kLarge = 24U << 20;
constexpr std::size_t kSmall = kLarge / 64;

// Checks that `work` on a message of many such parts takes no longer than on one of a 64th of them:
// it ends early. (Reading all would take 64 times as long.) The parts lie in fields `within`.
void check_ends_early(std::string_view part, const std::function<void(const std::string&)>& work,
                      const std::vector<std::uint32_t>& within = {});
// Checks that `work` takes no more than in proportion to the number of parts. (If it grew by the
// square of it, 8 times the parts would take 64 times as long.)
void check_in_proportion(std::string_view part,
                         const std::function<void(const std::string&)>& work);

// Whether `same(message, theirs)`, which decodes and compares, agrees with protobuf on many
// messages of type Theirs: random ones, or such that hold a random `part` in fields of the numbers
// `within`.
template <class Theirs, class Same>
void compare_many(std::uint64_t seed, std::size_t count, Same same,
                  const google::protobuf::Descriptor& part = *Theirs::descriptor(),
                  const std::vector<std::uint32_t>& within = {}) {
  RandomWire random(seed);
  const auto taken = [&](std::string message) {
    for (const std::uint32_t number : within) message = field(number, message);
    Theirs theirs;
    const bool accepted = theirs.ParseFromString(message);
    bool agreed = false;
    try {
      agreed = same(bytes_of(message), theirs) && accepted;
    } catch (const RequestError& error) {
      // The one thing that protobuf's C++ library takes and its others refuse.
      const bool wide =
          error.status().message.find("a tag of more than 32 bits") != std::string::npos;
      agreed = (!accepted || wide) && error.status().code == Code::kInvalidArgument;
    }
    if (!agreed) FAIL("accepted ", accepted, ": ", hex(message), " ", theirs.DebugString());
    return accepted;
  };
  std::size_t whole = 0, mutated = 0;
  for (std::size_t index = 0; index < count; ++index) {
    const std::string message = random.message(part);
    whole += taken(message);
    mutated += taken(random.mutated(message));
  }
  // Else it would not have tested much.
  CHECK(whole > count / 2);
  CHECK(whole < count);
  CHECK(mutated > count / 20);
}

}  // namespace attnserve::wire::tests
