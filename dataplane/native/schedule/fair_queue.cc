#include "schedule/fair_queue.h"

#include <algorithm>
#include <utility>

namespace attnserve::schedule {
namespace {

constexpr double kUnknownSeconds = 1e-3;  // virtual, of a job whose kind has never run

}  // namespace

void FairQueue::add(Entry entry) {
  const RequestContext& request = *entry.job->request;
  double& end = ends_[{request.caller, request.priority}];
  const double start = std::max(virtual_, end);
  end = start + (entry.seconds > 0 ? entry.seconds : kUnknownSeconds);
  entry.order = {request.priority, start, ++number_};
  seconds_[request.priority] += entry.seconds;
  const auto order = entry.order;
  entries_.emplace(order, std::move(entry));
}

Entry FairQueue::serve() {
  virtual_ = std::max(virtual_, std::get<1>(entries_.begin()->first));
  Entry taken;
  remove(entries_.begin(), taken);
  return taken;
}

FairQueue::Entries::iterator FairQueue::remove(Entries::iterator at, Entry& taken) {
  taken = std::move(at->second);
  seconds_[std::get<0>(taken.order)] -= taken.seconds;
  const auto next = entries_.erase(at);
  forget_if_empty();
  return next;
}

double FairQueue::seconds_ahead(std::uint32_t priority) const {
  double sum = 0.0;
  for (std::uint32_t each = 0; each <= priority; ++each) sum += seconds_[each];
  return std::max(sum, 0.0);
}

void FairQueue::forget_if_empty() {
  if (!entries_.empty()) return;
  virtual_ = 0.0;
  ends_.clear();
  std::fill(std::begin(seconds_), std::end(seconds_), 0.0);
}

}  // namespace attnserve::schedule
