#include "schedule/estimates.h"

namespace attnserve::schedule {
namespace {

constexpr double kNewest = 0.2;           // weight of the newest observation
constexpr std::size_t kMostKinds = 1024;  // remembered

}  // namespace

double Estimates::seconds(const engine::BatchKey& key, std::int64_t units) const {
  const auto found = means_.find(key);
  return found == means_.end() ? 0.0 : found->second.mean * static_cast<double>(units);
}

void Estimates::observe(const engine::BatchKey& key, std::int64_t units, double seconds) {
  const double newest = seconds / static_cast<double>(units);
  const auto found = means_.find(key);
  if (found != means_.end()) {
    found->second.mean += kNewest * (newest - found->second.mean);
    by_use_.splice(by_use_.end(), by_use_, found->second.place);
    return;
  }
  by_use_.push_back(key);
  means_.emplace(key, Entry{newest, std::prev(by_use_.end())});
  if (means_.size() > kMostKinds) {
    means_.erase(by_use_.front());
    by_use_.pop_front();
  }
}

}  // namespace attnserve::schedule
