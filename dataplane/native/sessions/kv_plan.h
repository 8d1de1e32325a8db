// What follows from a SessionSpec: which layers are alike, and which pages a window needs.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "sessions/kv_spec.h"

namespace attnserve::sessions {

// Layers of equal window and kept first keys.
struct WindowGroup {
  std::uint64_t window = 0;      // keys before its own that a query sees
  std::uint64_t kept_pages = 0;  // pages with kept first keys
  std::uint64_t most_pages = 0;  // at any time, in steps of at most KvConfig::promised_step
  std::vector<std::uint32_t> layers;
};

struct KvPlan {
  SessionSpec spec;
  PageHash digest{};                // of the spec
  std::vector<std::uint32_t> full;  // layers without window, not cross
  std::vector<std::uint32_t> cross;
  std::vector<WindowGroup> windows;

  std::uint64_t page_tokens() const { return spec.layout.page_tokens; }
  std::uint64_t pages(std::uint64_t tokens) const { return spec.layout.pages(tokens); }
  // The first page with a key that a query after `length` keys sees through the window, `more` keys
  // before it included.
  std::uint64_t first_page(const WindowGroup& group, std::uint64_t length,
                           std::uint64_t more) const {
    const std::uint64_t back = group.window + more;
    return length > back ? (length - back) / page_tokens() : 0;
  }
};
using KvPlanPtr = std::shared_ptr<const KvPlan>;

// Of layers as requests::plan_open and read_exported take them.
KvPlanPtr make_plan(const SessionSpec& spec, std::uint64_t promised_step);

}  // namespace attnserve::sessions
