#include "sessions/kv_session.h"

#include <algorithm>
#include <new>
#include <utility>

#include "sessions/kv_sessions.h"
#include "sessions/page_rows.h"

namespace attnserve::sessions {

KvSession::KvSession(KvPlanPtr plan, PageStore& store, KvPrefixes& prefixes, PageAccountPtr account)
    : plan_(std::move(plan)),
      store_(store),
      prefixes_(prefixes),
      account_(std::move(account)),
      pages_(store.of_size(plan_->spec.layout.page_bytes())),
      tables_(plan_->spec.layers.size()),
      first_pages_(plan_->windows.size(), 0) {}

std::uint64_t KvSession::keys(std::size_t layer) const {
  return plan_->spec.layers[layer].cross ? cross_length + cross_added : length + added;
}

std::size_t KvSession::window_charge(const WindowGroup& group, std::uint64_t tokens,
                                     std::uint64_t step) const {
  const std::uint64_t first = plan_->first_page(group, tokens, kTruncatable);
  const std::uint64_t given_back = first > group.kept_pages ? first - group.kept_pages : 0;
  const std::uint64_t held = plan_->pages(tokens + step) - given_back;
  if (frozen) return held;
  const std::uint64_t all = plan_->pages(std::max(reserved_tokens, tokens + step));
  return std::max(held, std::min(all, group.most_pages));
}

std::size_t KvSession::charge(std::uint64_t tokens, std::uint64_t step) const {
  const std::uint64_t all = plan_->pages(std::max(reserved_tokens, tokens + step));
  const std::uint64_t common =
      std::min<std::uint64_t>(common_pages_, tokens / plan_->page_tokens());
  std::size_t sum = plan_->full.size() * (all - common);
  for (const WindowGroup& group : plan_->windows) {
    sum += group.layers.size() * window_charge(group, tokens, step);
  }
  if (!cross_common_) {
    sum += plan_->cross.size() * plan_->pages(cross_length > 0 ? cross_length : cross_tokens);
  }
  return sum;
}

bool KvSession::promise(std::int64_t more) {
  if (!store_.promise(pages_, more)) return false;
  account_->bytes += static_cast<std::size_t>(more) * pages_.page_bytes();
  return true;
}

bool KvSession::recharge() {
  const std::size_t now = charge(length, added);
  if (!promise(static_cast<std::int64_t>(now - charged_))) return false;
  charged_ = now;
  return true;
}

void KvSession::make_common(std::uint64_t blocks) {
  if (plan_->full.empty() || blocks <= common_pages_) return;
  for (std::size_t block = common_pages_; block < blocks; ++block) {
    for (const std::uint32_t layer : plan_->full) {
      pages_.set_common(blocks_[block]->page(layer), account_);
    }
  }
  // What was promised to this session is promised to all of them now: the sum stays.
  const std::size_t pages = plan_->full.size() * (blocks - common_pages_);
  common_pages_ = blocks;
  promise(-static_cast<std::int64_t>(pages));
  charged_ -= pages;
}

void KvSession::adopt(std::size_t blocks) {
  if (!plan_->full.empty()) {
    for (std::size_t number = 0; number < blocks; ++number) {
      KvBlock& block =
          *blocks_.emplace_back(std::make_shared<KvBlock>(pages_, plan_->spec.layers.size()));
      for (const std::uint32_t layer : plan_->full) {
        const PageIndex page = prefixes_.page(chain[number], layer);
        pages_.share(page);
        block.put(layer, page);
      }
    }
  }
  for (const WindowGroup& group : plan_->windows) {  // nothing fails once pages are shared
    for (const std::uint32_t layer : group.layers) tables_[layer].reserve(blocks);
  }
  for (std::size_t number = 0; number < plan_->windows.size(); ++number) {
    const WindowGroup& group = plan_->windows[number];
    std::size_t first = plan_->first_page(group, blocks * plan_->page_tokens(), kTruncatable);
    // Of what is kept only to be truncated, as much as is there in every layer.
    const std::size_t needed = plan_->first_page(group, blocks * plan_->page_tokens(), 0);
    for (std::size_t block = needed; block-- > first;) {
      const bool there = std::ranges::all_of(group.layers, [&](std::uint32_t layer) {
        return prefixes_.page(chain[block], layer) != kNoPage;
      });
      if (!there) first = block + 1;
    }
    first_pages_[number] = first;
    for (const std::uint32_t layer : group.layers) {
      for (std::size_t block = 0; block < blocks; ++block) {
        const bool held = block < group.kept_pages || block >= first;
        const PageIndex page = held ? prefixes_.page(chain[block], layer) : kNoPage;
        if (held) pages_.share(page);
        tables_[layer].push_back(held ? pages_.offset(page) : kGivenBack);
      }
    }
  }
  common_pages_ = blocks_.size();
  length = blocks * plan_->page_tokens();
  chain.resize(blocks);
}

void KvSession::forget_prefix() {
  for (std::size_t& first : first_pages_) first = 0;
  length = 0;
  chain.clear();
}

void KvSession::adopt(KvSession& other, std::uint64_t tokens) {
  const std::size_t blocks = tokens / plan_->page_tokens();
  const std::size_t used = plan_->pages(tokens);
  chain.assign(other.chain.begin(), other.chain.begin() + static_cast<std::ptrdiff_t>(std::min(
                                                              other.chain.size(), blocks)));
  std::vector<KvBlockPtr> shared(
      other.blocks_.begin(),
      other.blocks_.begin() + static_cast<std::ptrdiff_t>(std::min(other.blocks_.size(), used)));
  std::vector<Table> tables(tables_.size());
  for (std::size_t layer = 0; layer < tables.size(); ++layer) {
    if (in_blocks(layer)) continue;
    const Table& table = other.tables_[layer];
    const std::size_t count = plan_->spec.layers[layer].cross ? table.size() : used;
    tables[layer].assign(table.begin(), table.begin() + static_cast<std::ptrdiff_t>(count));
  }
  for (std::size_t number = 0; number < plan_->windows.size(); ++number) {
    const WindowGroup& group = plan_->windows[number];
    std::size_t& first = first_pages_[number];
    first = plan_->first_page(group, tokens, kTruncatable);
    if (used > group.kept_pages) first = std::max(first, other.first_pages_[number]);
    for (const std::uint32_t layer : group.layers) {
      for (std::size_t page = group.kept_pages; page < std::min(first, used); ++page) {
        tables[layer][page] = kGivenBack;
      }
    }
  }
  blocks_ = std::move(shared);
  tables_ = std::move(tables);  // nothing fails from here on
  for (const Table& table : tables_) {
    for (const std::int64_t offset : table) {
      if (offset != kGivenBack) pages_.share(index(offset));
    }
  }
  other.make_common(blocks);
  common_pages_ = plan_->full.empty() ? 0 : blocks;
  if (other.cross_length > 0 && !other.cross_common_) {
    for (const std::uint32_t layer : plan_->cross) {
      for (const std::int64_t offset : tables_[layer]) pages_.set_common(index(offset), account_);
    }
    other.cross_common_ = true;
    other.recharge();  // to what is promised for all of them now
  }
  cross_common_ = other.cross_common_;
  length = tokens;
  cross_length = other.cross_length;
  cross_tokens = other.cross_tokens;
}

void KvSession::provide(const std::vector<std::uint32_t>& first_pages) {
  for (std::size_t number = 0; number < plan_->windows.size(); ++number) {
    first_pages_[number] = first_pages[plan_->windows[number].layers.front()];
  }
  for (std::size_t layer = 0; layer < tables_.size(); ++layer) {
    const std::size_t count = plan_->pages(keys(layer));
    if (in_blocks(layer)) {
      fill_table(layer, count);
      continue;
    }
    tables_[layer].reserve(count);
    const auto group = std::ranges::find_if(plan_->windows, [&](const WindowGroup& of) {
      return std::ranges::find(of.layers, layer) != of.layers.end();
    });
    const bool window = group != plan_->windows.end();
    for (std::size_t page = 0; page < count; ++page) {
      const bool held = !window || page < group->kept_pages || page >= first_pages[layer];
      tables_[layer].push_back(held ? pages_.offset(pages_.take()) : kGivenBack);
    }
  }
}

// Of a page that nobody else holds.
void KvSession::make_own(PageIndex page) {
  if (pages_.published(page)) prefixes_.withdraw(pages_, page);
  pages_.set_own(page);
}

// A page with these tokens of another one, to be written to: itself, or a copy in its place.
PageIndex KvSession::owned(PageIndex page, std::size_t tokens) {
  if (pages_.references(page) == 1) {
    make_own(page);
    return page;
  }
  const PageIndex copy = pages_.take();
  copy_tokens(plan_->spec.layout, data(pages_.offset(page)), 0, data(pages_.offset(copy)), 0,
              tokens);
  pages_.drop(page);
  return copy;
}

// Before a layer's last page, of so many tokens, is written to. True: it is a copy now.
bool KvSession::own_last(std::size_t layer, std::size_t number, std::size_t tokens) {
  if (in_blocks(layer) && blocks_[number].use_count() > 1) {
    blocks_[number] = std::make_shared<KvBlock>(*blocks_[number]);
  }
  std::int64_t& offset = tables_[layer][number];
  const PageIndex before = index(offset), now = owned(before, tokens);
  if (in_blocks(layer)) blocks_[number]->put(layer, now);
  offset = pages_.offset(now);
  return now != before;
}

// Brings a table up to so many pages: those of its blocks, then new ones.
void KvSession::fill_table(std::size_t layer, std::size_t pages) {
  Table& table = tables_[layer];
  if (table.capacity() < pages) table.reserve(std::max(pages, 2 * table.capacity()));
  while (table.size() < pages) {
    if (!in_blocks(layer)) {
      table.push_back(pages_.offset(pages_.take()));
      continue;
    }
    if (table.size() == blocks_.size()) {
      blocks_.push_back(std::make_shared<KvBlock>(pages_, tables_.size()));
    }
    KvBlock& block = *blocks_[table.size()];
    if (block.page(layer) == kNoPage) block.put(layer, pages_.take());
    table.push_back(pages_.offset(block.page(layer)));
  }
}

bool KvSession::grow(std::size_t layer) {
  const bool cross = plan_->spec.layers[layer].cross;
  const std::uint64_t before = cross ? cross_length : length;
  const std::uint64_t after = keys(layer);
  fill_table(layer, plan_->pages(before));  // of a fork, too, which reads them alone
  if (after == before) return false;
  const std::size_t first = before / plan_->page_tokens();
  const std::size_t tokens = before % plan_->page_tokens();
  const bool copied = tokens > 0 && own_last(layer, first, tokens);
  fill_table(layer, plan_->pages(after));
  return copied;
}

void KvSession::drop_from(Table& table, std::size_t page) {
  while (table.size() > page) {
    if (table.back() != kGivenBack) pages_.drop(index(table.back()));
    table.pop_back();
  }
}

// All layers but cross ones; the tables of layers in blocks stay as they are.
void KvSession::drop_from(std::size_t page) {
  while (blocks_.size() > page) blocks_.pop_back();
  for (const WindowGroup& group : plan_->windows) {
    for (const std::uint32_t layer : group.layers) drop_from(tables_[layer], page);
  }
}

void KvSession::cut(std::uint64_t tokens) {
  const std::size_t page = plan_->pages(tokens);
  const std::size_t blocks = tokens / plan_->page_tokens();
  drop_from(page);
  for (const std::uint32_t layer : plan_->full) {
    tables_[layer].resize(std::min(tables_[layer].size(), page));
  }
  for (std::size_t number = 0; number < plan_->windows.size(); ++number) {
    if (page <= plan_->windows[number].kept_pages) first_pages_[number] = 0;
  }
  if (blocks < common_pages_) {
    if (page > blocks && blocks_.back().use_count() == 1) {  // it is to be written to again
      for (const std::uint32_t layer : plan_->full) {
        const PageIndex last = blocks_.back()->page(layer);
        if (pages_.references(last) == 1) make_own(last);
      }
    }
    common_pages_ = blocks;
  }
  if (chain.size() > blocks) chain.resize(blocks);
}

void KvSession::cut_cross() {
  for (const std::uint32_t layer : plan_->cross) drop_from(tables_[layer], 0);
}

std::size_t KvSession::common_alone(std::uint64_t tokens) const {
  std::size_t count = 0;
  for (std::size_t block = tokens / plan_->page_tokens(); block < common_pages_; ++block) {
    if (blocks_[block].use_count() > 1) continue;
    for (const std::uint32_t layer : plan_->full) {
      const PageIndex page = blocks_[block]->page(layer);
      if (pages_.references(page) == 1 && pages_.common(page)) ++count;
    }
  }
  return count;
}

bool KvSession::window_holds(std::uint64_t tokens) const {
  for (std::size_t number = 0; number < plan_->windows.size(); ++number) {
    const WindowGroup& group = plan_->windows[number];
    if (first_pages_[number] <= group.kept_pages || plan_->pages(tokens) <= group.kept_pages) {
      continue;
    }
    if (plan_->first_page(group, tokens, 0) < first_pages_[number]) return false;
  }
  return true;
}

void KvSession::slide() {
  for (std::size_t number = 0; number < plan_->windows.size(); ++number) {
    const WindowGroup& group = plan_->windows[number];
    const std::size_t first = plan_->first_page(group, length, kTruncatable);
    if (first <= first_pages_[number]) continue;
    for (std::size_t page = std::max<std::size_t>(first_pages_[number], group.kept_pages);
         page < first; ++page) {
      for (const std::uint32_t layer : group.layers) {
        const std::int64_t offset = std::exchange(tables_[layer][page], kGivenBack);
        pages_.drop(index(offset));
      }
    }
    first_pages_[number] = first;
  }
}

void KvSession::publish(const std::vector<BlockKey>& keys) {
  try {
    chain.reserve(chain.size() + keys.size());
    for (const BlockKey& key : keys) {
      const std::size_t block = chain.size();
      for (std::size_t layer = 0; layer < tables_.size(); ++layer) {
        const std::int64_t offset = page(layer, block);
        if (offset != kGivenBack) prefixes_.publish(plan_, pages_, key, layer, index(offset));
      }
      chain.push_back(key);
    }
  } catch (const std::bad_alloc&) {
    // Nobody will find the rest; the session has its pages as before.
  }
  make_common(chain.size());
}

void KvSession::release() {
  cut_cross();
  std::size_t deepest = 0;
  for (std::size_t layer = 0; layer < tables_.size(); ++layer) {
    deepest = std::max(deepest, page_count(layer));
  }
  for (std::size_t page = deepest; page-- > 0;) drop_from(page);
  for (const std::uint32_t layer : plan_->full) tables_[layer].clear();
  common_pages_ = 0;
  promise(-static_cast<std::int64_t>(charged_));
  charged_ = 0;
}

}  // namespace attnserve::sessions
