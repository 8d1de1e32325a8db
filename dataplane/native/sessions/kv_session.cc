#include "sessions/kv_session.h"

#include <algorithm>
#include <new>
#include <utility>

#include "sessions/kv_sessions.h"
#include "sessions/page_rows.h"

namespace attnserve::sessions {

KvSession::KvSession(KvPlanPtr plan, PageStore& store, KvPrefixes& prefixes)
    : plan_(std::move(plan)),
      store_(store),
      prefixes_(prefixes),
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

bool KvSession::recharge() {
  const std::size_t now = charge(length, added);
  if (!store_.promise(pages_, static_cast<std::int64_t>(now - charged_))) return false;
  charged_ = now;
  return true;
}

void KvSession::make_common(std::uint64_t blocks) {
  if (blocks <= common_pages_) return;
  for (const std::uint32_t layer : plan_->full) {
    for (std::size_t page = common_pages_; page < blocks; ++page) {
      pages_.set_common(index(tables_[layer][page]), true);
    }
  }
  // What was promised to this session is promised to all of them now: the sum stays.
  const std::size_t pages = plan_->full.size() * (blocks - common_pages_);
  common_pages_ = blocks;
  store_.promise(pages_, -static_cast<std::int64_t>(pages));
  charged_ -= pages;
}

void KvSession::adopt(std::size_t blocks) {
  for (Table& table : tables_) table.reserve(blocks);  // nothing fails once pages are shared
  for (const std::uint32_t layer : plan_->full) {
    for (std::size_t block = 0; block < blocks; ++block) {
      const PageIndex page = prefixes_.page(chain[block], layer);
      pages_.share(page);
      tables_[layer].push_back(pages_.offset(page));
    }
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
  common_pages_ = blocks;
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
  std::vector<Table> tables(tables_.size());
  for (std::size_t layer = 0; layer < tables.size(); ++layer) {
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
  tables_ = std::move(tables);  // nothing fails from here on
  for (const Table& table : tables_) {
    for (const std::int64_t offset : table) {
      if (offset != kGivenBack) pages_.share(index(offset));
    }
  }
  other.make_common(blocks);
  common_pages_ = blocks;
  if (other.cross_length > 0 && !other.cross_common_) {
    for (const std::uint32_t layer : plan_->cross) {
      for (const std::int64_t offset : tables_[layer]) pages_.set_common(index(offset), true);
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

bool KvSession::own(Table& table, std::size_t page, std::size_t tokens) {
  const PageIndex shared = index(table[page]);
  if (pages_.references(shared) > 1) {
    const PageIndex copy = pages_.take();
    copy_tokens(plan_->spec.layout, data(table[page]), 0, data(pages_.offset(copy)), 0, tokens);
    table[page] = pages_.offset(copy);
    pages_.drop(shared);
    return true;
  }
  if (pages_.published(shared)) prefixes_.withdraw(pages_, shared);
  pages_.set_common(shared, false);
  return false;
}

bool KvSession::grow(std::size_t layer) {
  Table& table = tables_[layer];
  const bool cross = plan_->spec.layers[layer].cross;
  const std::uint64_t before = cross ? cross_length : length;
  const std::uint64_t after = keys(layer);
  if (after == before) return false;
  const std::size_t first = before / plan_->page_tokens();
  const std::size_t tokens = before % plan_->page_tokens();
  const bool copied = tokens > 0 && own(table, first, tokens);
  const std::size_t needed = plan_->pages(after);
  if (table.capacity() < needed) table.reserve(std::max(needed, 2 * table.capacity()));
  while (table.size() < needed) table.push_back(pages_.offset(pages_.take()));
  return copied;
}

void KvSession::drop_from(Table& table, std::size_t page) {
  while (table.size() > page) {
    if (table.back() != kGivenBack) pages_.drop(index(table.back()));
    table.pop_back();
  }
}

void KvSession::cut(std::uint64_t tokens) {
  const std::size_t page = plan_->pages(tokens);
  const std::size_t blocks = tokens / plan_->page_tokens();
  for (std::size_t layer = 0; layer < tables_.size(); ++layer) {
    if (!plan_->spec.layers[layer].cross) drop_from(tables_[layer], page);
  }
  for (std::size_t number = 0; number < plan_->windows.size(); ++number) {
    if (page <= plan_->windows[number].kept_pages) first_pages_[number] = 0;
  }
  if (blocks < common_pages_) {
    if (page > blocks) {  // the last page is to be written to again
      for (const std::uint32_t layer : plan_->full) {
        const PageIndex last = index(tables_[layer].back());
        if (pages_.references(last) > 1) continue;
        if (pages_.published(last)) prefixes_.withdraw(pages_, last);
        pages_.set_common(last, false);
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
  for (const std::uint32_t layer : plan_->full) {
    for (std::size_t page = tokens / plan_->page_tokens(); page < common_pages_; ++page) {
      const PageIndex of = index(tables_[layer][page]);
      if (pages_.references(of) == 1 && pages_.common(of)) ++count;
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
        const std::int64_t offset = tables_[layer][block];
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
  std::size_t deepest = 0;
  for (const Table& table : tables_) deepest = std::max(deepest, table.size());
  for (std::size_t page = deepest; page-- > 0;) {
    for (Table& table : tables_) drop_from(table, page);
  }
  common_pages_ = 0;
  store_.promise(pages_, -static_cast<std::int64_t>(charged_));
  charged_ = 0;
}

}  // namespace attnserve::sessions
