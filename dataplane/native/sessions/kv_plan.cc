#include "sessions/kv_plan.h"

#include <openssl/sha.h>

#include <bit>
#include <string>

#include "sessions/kv_sessions.h"

namespace attnserve::sessions {

namespace {

void add_number(std::string& to, std::uint64_t number) {
  for (int shift = 0; shift < 64; shift += 8) to += static_cast<char>(number >> shift & 0xFF);
}

// No two specs have one digest: each part has a fixed size, or says how long it is.
PageHash digest_of(const SessionSpec& spec) {
  std::string all;
  const auto add_name = [&](const std::string& name) {
    add_number(all, name.size());
    all += name;
  };
  add_name(spec.model);
  add_name(spec.version);
  add_number(all, spec.layer_models.size());
  for (const ModelName& each : spec.layer_models) {
    add_name(each.model);
    add_name(each.version);
  }
  const PageLayout& layout = spec.layout;
  for (const std::size_t size :
       {layout.num_kv_heads, layout.head_dim, layout.value_head_dim,
        static_cast<std::size_t>(layout.type), layout.page_tokens, std::size_t{layout.latent}}) {
    add_number(all, size);
  }
  for (const LayerSpec& layer : spec.layers) {
    add_number(all, static_cast<std::uint64_t>(layer.window));
    add_number(all, static_cast<std::uint64_t>(layer.kept_first));
    add_number(all, layer.cross ? 1 : 0);
    add_number(all, layer.sinks.size());
    for (const float sink : layer.sinks) add_number(all, std::bit_cast<std::uint32_t>(sink));
  }
  PageHash digest;
  SHA256(reinterpret_cast<const unsigned char*>(all.data()), all.size(), digest.data());
  return digest;
}

}  // namespace

KvPlanPtr make_plan(const SessionSpec& spec, std::uint64_t promised_step) {
  auto plan = std::make_shared<KvPlan>();
  plan->spec = spec;
  plan->digest = digest_of(spec);
  for (std::size_t index = 0; index < spec.layers.size(); ++index) {
    const LayerSpec& layer = spec.layers[index];
    const auto number = static_cast<std::uint32_t>(index);
    if (layer.cross || layer.window < 0) {
      (layer.cross ? plan->cross : plan->full).push_back(number);
      continue;
    }
    const auto window = static_cast<std::uint64_t>(layer.window);
    const std::uint64_t kept_pages = plan->pages(static_cast<std::uint64_t>(layer.kept_first));
    auto group = std::ranges::find_if(plan->windows, [&](const WindowGroup& other) {
      return other.window == window && other.kept_pages == kept_pages;
    });
    if (group == plan->windows.end()) {
      // So many tokens touch one page more than they fill, wherever they begin.
      const std::uint64_t most =
          kept_pages + 1 + plan->pages(window + kTruncatable + promised_step);
      group = plan->windows.insert(group, {window, kept_pages, most, {}});
    }
    group->layers.push_back(number);
  }
  return plan;
}

}  // namespace attnserve::sessions
