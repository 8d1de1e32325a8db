#include "base/pace.h"

#include <algorithm>

#include "base/text.h"

namespace attnserve {

void Pace::begin(TimePoint now) {
  const bool bound = rule_.bytes_per_second > 0 && rule_.grace > Duration::zero();
  due_ = bound && rule_.grace < kNever - now ? now + rule_.grace : kNever;
}

void Pace::took(std::size_t bytes, TimePoint now) {
  if (due_ == kNever) return;
  const std::chrono::duration<double> earned(static_cast<double>(bytes) / rule_.bytes_per_second);
  const TimePoint latest = now + 2 * rule_.grace;
  if (earned >= latest - due_) {
    due_ = std::max(due_, latest);
  } else {
    due_ += std::chrono::duration_cast<Duration>(earned);
  }
}

void Pace::forgive(Duration held) {
  if (due_ != kNever) due_ += held;
}

Status Pace::late(std::string_view field) const {
  return {
      Code::kDeadlineExceeded,
      text(field, ": given less than ", rule_.bytes_per_second, " bytes a second for longer than ",
           seconds(rule_.grace), " seconds; allowed: at least as much"),
      {}};
}

}  // namespace attnserve
