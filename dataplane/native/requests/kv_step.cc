#include <string>
#include <utility>

#include "base/text.h"
#include "requests/kv_room.h"
#include "requests/kv_sessions.h"
#include "requests/options.h"
#include "requests/refusal.h"

namespace attnserve::requests {
namespace {

// A tree: each token's parent comes before it.
void check_parents(const std::string& field, const wire::SessionStep& message) {
  if (message.parents.size() != message.new_tokens) {
    refuse(text(field, ".parents"), text(message.parents.size(), " of them"),
           text("none, or one for each of new_tokens, ", message.new_tokens));
  }
  for (std::size_t at = 0; at < message.parents.size(); ++at) {
    const std::int64_t parent = message.parents[at];
    if (parent >= -1 && parent < static_cast<std::int64_t>(at)) continue;
    refuse(text(field, ".parents[", at, "]"), std::to_string(parent),
           at == 0 ? std::string("-1, the last token before the step")
                   : text("-1..", at - 1, ", a token before it"));
  }
  if (!message.prefix_hashes.empty()) {
    refuse(text(field, ".prefix_hashes"), text(message.prefix_hashes.size(), " bytes"),
           "nothing with parents: which tokens are kept is not known yet");
  }
}

sessions::SessionStep checked_session(const std::string& field, const wire::SessionStep& message,
                                      std::uint64_t most) {
  checked_tokens(text(field, ".new_tokens"), message.new_tokens, 1, most);
  checked_tokens(text(field, ".cross_tokens"), message.cross_tokens, 0, most);
  if (!message.parents.empty()) check_parents(field, message);
  return {message.session_id, message.new_tokens, message.parents,
          checked_hashes(text(field, ".prefix_hashes"), message.prefix_hashes),
          message.cross_tokens};
}

void check_total(std::string_view letter, std::string_view field, std::int64_t total,
                 const Limits& limits) {
  if (total <= limits.max_seq_len) return;
  refuse(text(field, " ", letter, " of all sessions"), std::to_string(total),
         text("0..", limits.max_seq_len));
}

// A step that brings queries alone adds nothing to a session.
void check_adds_nothing(const std::string& field, const wire::SessionStep& message) {
  const auto check = [&](std::string_view name, std::size_t given) {
    if (given == 0) return;
    refuse(text(field, ".", name), std::to_string(given), "none with queries_only");
  };
  check("parents", message.parents.size());
  check("prefix_hashes", message.prefix_hashes.size());
  check("cross_tokens", message.cross_tokens);
}

StepPlan plan_of(std::uint64_t step_id, const wire::BeginStep& message, const Limits& limits) {
  StepPlan plan;
  if (step_id == 0) refuse("step_id", "0", "1 or more");
  plan.step_id = step_id;
  plan.priority = checked_priority(message.priority);
  plan.queries_only = message.queries_only;
  const std::size_t count = message.sessions.size();
  if (count < 1 || count > static_cast<std::size_t>(limits.max_batch)) {
    refuse("sessions", text(count, " of them"), text("1..", limits.max_batch));
  }
  plan.sessions.reserve(count);
  for (std::size_t at = 0; at < count; ++at) {
    const std::string field = text("sessions[", at, "]");
    const wire::SessionStep& session = message.sessions[at];
    plan.sessions.push_back(
        checked_session(field, session, static_cast<std::uint64_t>(limits.max_seq_len)));
    if (plan.queries_only) check_adds_nothing(field, session);
    plan.tokens += session.new_tokens;
    plan.cross_tokens += session.cross_tokens;
  }
  check_total("T", "new_tokens", plan.tokens, limits);
  check_total("C", "cross_tokens", plan.cross_tokens, limits);
  return plan;
}

}  // namespace

StepPlan plan_step(const wire::BeginStep& message, const Limits& limits) {
  return plan_of(message.step_id, message, limits);
}

StepPlan plan_begun_step(const wire::AttendLayer& message, const Limits& limits) {
  const std::uint64_t given = message.begin->step_id;
  if (given != 0 && given != message.step_id) {
    refuse("begin.step_id", std::to_string(given),
           text(message.step_id, ", the layer's step_id, or 0"));
  }
  return plan_of(message.step_id, *message.begin, limits);
}

}  // namespace attnserve::requests
