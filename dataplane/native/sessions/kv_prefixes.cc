#include "sessions/kv_prefixes.h"

#include <openssl/sha.h>

#include <algorithm>

#include "base/random.h"

namespace attnserve::sessions {

namespace {

constexpr std::size_t kSecretBytes = 32;

BlockKey hash_of(std::string_view bytes) {
  BlockKey key;
  SHA256(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(), key.data());
  return key;
}

std::string_view view_of(const PageHash& hash) {
  return {reinterpret_cast<const char*>(hash.data()), hash.size()};
}

}  // namespace

KvPrefixes::KvPrefixes() : secret_(random_hex(kSecretBytes)) {}

BlockKey KvPrefixes::root_of(const KvPlan& plan, std::string_view owner) const {
  std::string all = secret_;
  all += view_of(plan.digest);
  all += owner;
  return hash_of(all);
}

void KvPrefixes::append(std::vector<BlockKey>& chain, const BlockKey& root,
                        std::span<const PageHash> hashes) {
  chain.reserve(chain.size() + hashes.size());
  BlockKey last = chain.empty() ? root : chain.back();
  std::string both(2 * sizeof(PageHash), '\0');
  for (const PageHash& hash : hashes) {
    std::ranges::copy(view_of(last), both.begin());
    std::ranges::copy(view_of(hash), both.begin() + sizeof(PageHash));
    last = hash_of(both);
    chain.push_back(last);
  }
}

const KvPrefixes::Block* KvPrefixes::find_block(const BlockKey& key) const {
  const auto found = by_key_.find(key);
  return found == by_key_.end() ? nullptr : &blocks_[found->second];
}

std::size_t KvPrefixes::find(const KvPlan& plan, std::span<const BlockKey> chain) const {
  std::vector<const Block*> blocks;
  blocks.reserve(chain.size());
  for (const BlockKey& key : chain) blocks.push_back(find_block(key));
  const auto has = [&](std::size_t block, const std::vector<std::uint32_t>& layers) {
    const Block* of = blocks[block];
    return of && (of->count == of->of_layer.size() ||
                  std::ranges::all_of(
                      layers, [&](std::uint32_t layer) { return of->of_layer[layer] != kNoPage; }));
  };

  // Layers without window need all blocks.
  std::size_t most = chain.size();
  if (!plan.full.empty()) {
    most = 0;
    while (most < chain.size() && has(most, plan.full)) ++most;
  }
  // Of the lengths up to there, those for which each window finds what it needs.
  std::vector<bool> possible(most + 1, true);
  for (const WindowGroup& group : plan.windows) {
    std::size_t kept = 0;  // blocks that are there from the first one on
    while (kept < most && has(kept, group.layers)) ++kept;
    std::size_t run = 0;  // blocks that are there, one after another, up to the one before `length`
    for (std::size_t length = 1; length <= most; ++length) {
      run = has(length - 1, group.layers) ? run + 1 : 0;
      const std::uint64_t first = plan.first_page(group, length * plan.page_tokens(), 0);
      const bool found =
          kept >= std::min<std::uint64_t>(group.kept_pages, length) && run >= length - first;
      if (!found) possible[length] = false;
    }
  }
  while (!possible[most]) --most;  // 0 is
  return most;
}

PageIndex KvPrefixes::page(const BlockKey& key, std::size_t layer) const {
  const Block* block = find_block(key);
  return block ? block->of_layer[layer] : kNoPage;
}

void KvPrefixes::publish(const KvPlanPtr& plan, PageClass& pages, const BlockKey& key,
                         std::size_t layer, PageIndex page) {
  if (unused_.empty()) {
    unused_.push_back(static_cast<std::uint32_t>(blocks_.size()));
    blocks_.emplace_back();
  }
  const auto [found, is_new] = by_key_.try_emplace(key, unused_.back());
  if (is_new) {
    unused_.pop_back();
    std::vector<PageIndex> none(plan->spec.layers.size(), kNoPage);
    blocks_[found->second] = {key, plan, &pages, std::move(none), 0};
  }
  Block& block = blocks_[found->second];
  if (block.of_layer[layer] != kNoPage || pages.published(page)) return;
  block.of_layer[layer] = page;
  ++block.count;
  pages.publish(page, {found->second, static_cast<std::uint32_t>(layer)});
}

void KvPrefixes::withdraw(PageClass& pages, PageIndex page) {
  const Published where = pages.where(page);
  const Block& block = blocks_[where.block];
  if (block.plan->spec.layers[where.layer].window >= 0) {
    remove(where.block, where.layer);
    return;
  }
  const std::size_t layers = block.of_layer.size();
  for (std::size_t layer = 0; layer < layers && blocks_[where.block].count > 0; ++layer) {
    if (blocks_[where.block].of_layer[layer] != kNoPage) remove(where.block, layer);
  }
}

void KvPrefixes::remove(std::uint32_t number, std::size_t layer) {
  Block& block = blocks_[number];
  block.pages->withdraw(std::exchange(block.of_layer[layer], kNoPage));
  if (--block.count > 0) return;
  by_key_.erase(block.key);
  block = Block{};
  unused_.push_back(number);
}

}  // namespace attnserve::sessions
