#include "sessions/page_store.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "base/status.h"
#include "base/text.h"

namespace attnserve::sessions {

namespace {

// What the system maps as one where it can.
constexpr std::size_t kLargePage = std::size_t{2} << 20;

std::size_t system_page() {
  static const std::size_t size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

std::size_t rounded_up(std::size_t size, std::size_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

std::size_t rounded_down(std::size_t size, std::size_t multiple) {
  return size / multiple * multiple;
}

RequestError no_memory(std::size_t size) {
  return RequestError(Code::kResourceExhausted,
                      text("memory of KV sessions: ", size,
                           " bytes could not be had: ", std::generic_category().message(errno)));
}

}  // namespace

PageClass::PageClass(PageStore& store, std::size_t first, std::size_t page_bytes,
                     std::size_t slab_pages, std::size_t most_slabs)
    : store_(store),
      first_(first),
      page_bytes_(page_bytes),
      slab_pages_(slab_pages),
      most_slabs_(most_slabs) {
  pages_.reserve(most_slabs * slab_pages);
}

std::size_t PageClass::slabs_needed(std::size_t more_in_use) const {
  return std::max(counts_.slabs_in_use + more_in_use,
                  (counts_.promised + slab_pages_ - 1) / slab_pages_);
}

bool PageClass::may_use_another_slab() const {
  const std::size_t more = slabs_needed(1) - slabs_needed();
  return store_.needed_bytes() + more * slab_bytes() <= store_.max_bytes_;
}

PageIndex PageClass::take() {
  if (counts_.in_use >= counts_.promised) {
    throw std::logic_error("KV sessions: a page was taken that nobody was promised");
  }
  for (;;) {
    const bool another = may_use_another_slab();
    if (!partial_.empty() || (another && (!idle_.empty() || add_slab()))) break;
    if (evict_oldest(another)) continue;
    store_.clear_oldest_slab(*this);
  }
  const std::uint32_t slab = partial_.empty() ? *idle_.begin() : *partial_.begin();
  const PageIndex page = slabs_[slab].free;
  slabs_[slab].free = pages_[page].next;
  pages_[page].free = false;
  use(page);
  pages_[page].references = 1;
  return page;
}

void PageClass::share(PageIndex page) {
  if (pages_[page].references++ > 0) return;
  remove_cached(page);
  use(page);
  if (common(page)) count_common(page, true);
}

void PageClass::drop(PageIndex page) {
  if (--pages_[page].references > 0) return;
  --counts_.in_use;
  if (--slab_of(page).in_use == 0) --counts_.slabs_in_use;
  if (common(page)) count_common(page, false);
  if (published(page))
    put_cached(page);
  else
    put_free(page);
}

void PageClass::withdraw(PageIndex page) {
  pages_[page].where = {};
  if (pages_[page].references > 0) return;
  remove_cached(page);
  ++store_.evictions_;
  put_free(page);
}

void PageClass::set_common(PageIndex page, const PageAccountPtr& of) {
  if (common(page)) return;
  pages_[page].common_of = of;
  count_common(page, true);
}

void PageClass::set_own(PageIndex page) {
  if (!common(page)) return;
  count_common(page, false);
  pages_[page].common_of.reset();
}

void PageClass::count_common(PageIndex page, bool more) {
  std::size_t& bytes = pages_[page].common_of->bytes;
  if (more) {
    ++counts_.promised;
    bytes += page_bytes_;
  } else {
    --counts_.promised;
    bytes -= page_bytes_;
  }
}

void PageClass::use(PageIndex page) {
  ++counts_.in_use;
  if (slab_of(page).in_use++ == 0) ++counts_.slabs_in_use;
  set_place(static_cast<std::uint32_t>(page / slab_pages_));
}

void PageClass::set_place(std::uint32_t slab) {
  Slab& of = slabs_[slab];
  const Place place = of.free == kNoPage ? Place::kFull
                      : of.in_use > 0    ? Place::kPartial
                                         : Place::kIdle;
  if (place == of.place) return;
  if (of.place == Place::kAbsent) absent_.erase(slab);
  if (of.place == Place::kPartial) partial_.erase(slab);
  if (of.place == Place::kIdle) idle_.erase(slab);
  if (place == Place::kPartial) partial_.insert(slab);
  if (place == Place::kIdle) idle_.insert(slab);
  of.place = place;
}

void PageClass::put_free(PageIndex page) {
  Slab& slab = slab_of(page);
  pages_[page] = Page{};
  pages_[page].next = std::exchange(slab.free, page);
  set_place(static_cast<std::uint32_t>(page / slab_pages_));
}

void PageClass::put_cached(PageIndex page) {
  ++counts_.cached;
  ++slab_of(page).cached;
  slab_of(page).last_used = ++store_.now_;
  pages_[page].before = newest_;
  pages_[page].next = kNoPage;
  (newest_ == kNoPage ? oldest_ : pages_[newest_].next) = page;
  newest_ = page;
  set_place(static_cast<std::uint32_t>(page / slab_pages_));
}

void PageClass::remove_cached(PageIndex page) {
  --counts_.cached;
  --slab_of(page).cached;
  const PageIndex before = pages_[page].before, next = pages_[page].next;
  (before == kNoPage ? oldest_ : pages_[before].next) = next;
  (next == kNoPage ? newest_ : pages_[next].before) = before;
}

bool PageClass::evict_oldest(bool anywhere) {
  PageIndex page = oldest_;
  while (page != kNoPage && !anywhere && slab_of(page).in_use == 0) page = pages_[page].next;
  if (page == kNoPage) return false;
  evict(page);
  return true;
}

void PageClass::evict(PageIndex page) {
  store_.on_evict_(*this, page);
  if (published(page)) withdraw(page);
}

bool PageClass::add_slab() {
  if (!store_.make_room(*this, slab_bytes())) return false;
  if (absent_.empty() && slabs_.size() == most_slabs_) return false;
  const bool is_new = absent_.empty();
  const std::size_t slab = is_new ? slabs_.size() : *absent_.begin();
  const std::size_t start = first_ + slab * slab_bytes();
  if (is_new) {
    const std::size_t from = rounded_down(start, kLargePage);
    const std::size_t to = rounded_up(start + slab_bytes(), kLargePage);
    if (mprotect(store_.start_ + from, to - from, PROT_READ | PROT_WRITE) != 0) {
      throw no_memory(to - from);
    }
    slabs_.emplace_back();
    pages_.resize(pages_.size() + slab_pages_);
  }
  store_.memory_ += slab_bytes();
  ++counts_.slabs;
  for (std::size_t page = slab_pages_; page-- > 0;) {
    put_free(static_cast<PageIndex>(slab * slab_pages_ + page));
  }
  return true;
}

void PageClass::give_back(std::uint32_t slab) {
  const std::size_t start = first_ + slab * slab_bytes();
  const std::size_t from = rounded_up(start, system_page());
  const std::size_t to = rounded_down(start + slab_bytes(), system_page());
  if (from < to) madvise(store_.start_ + from, to - from, MADV_DONTNEED);
  idle_.erase(slab);
  absent_.insert(slab);
  slabs_[slab] = Slab{};
  store_.memory_ -= slab_bytes();
  --counts_.slabs;
}

PageStore::PageStore(std::size_t max_bytes, std::size_t slab_bytes, OnEvict on_evict)
    : max_bytes_(max_bytes), slab_bytes_(slab_bytes), on_evict_(std::move(on_evict)) {
  class_bytes_ = rounded_up(std::max<std::size_t>(max_bytes, 1), kLargePage);
  reserved_ = class_bytes_ * kMostClasses + kLargePage;
  // Address space only: not readable until a slab is there, so no promise of the system is needed.
  mapped_ = mmap(nullptr, reserved_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped_ == MAP_FAILED) throw no_memory(reserved_);
  const auto address = reinterpret_cast<std::uintptr_t>(mapped_);
  start_ = static_cast<std::byte*>(mapped_) + (rounded_up(address, kLargePage) - address);
  // The fewer addresses there are to translate, the faster a cache is read. Small pages serve where
  // the system has no large ones.
  madvise(mapped_, reserved_, MADV_HUGEPAGE);
}

PageStore::~PageStore() { munmap(mapped_, reserved_); }

PageClass& PageStore::of_size(std::size_t page_bytes) {
  for (PageClass& of : classes_) {
    if (of.page_bytes() == page_bytes) return of;
  }
  if (page_bytes > max_bytes_) {
    throw RequestError(Code::kResourceExhausted,
                       text("pages of KV sessions: of ", page_bytes,
                            " bytes; allowed: ", max_bytes_, " together (--max-kv-mib)"));
  }
  const std::size_t slab_pages =
      std::max<std::size_t>(1, std::min(slab_bytes_, max_bytes_) / page_bytes);
  const std::size_t most_slabs = max_bytes_ / (slab_pages * page_bytes);
  if (classes_.size() < kMostClasses) {
    return classes_.emplace_back(*this, classes_.size() * class_bytes_, page_bytes, slab_pages,
                                 most_slabs);
  }
  PageClass& unused = clear_unused_class();
  const std::size_t first = unused.first_;
  std::destroy_at(&unused);
  return *std::construct_at(&unused, *this, first, page_bytes, slab_pages, most_slabs);
}

PageClass& PageStore::clear_unused_class() {
  const auto unused =
      std::ranges::find_if(classes_, [](const PageClass& of) { return of.counts_.promised == 0; });
  if (unused == classes_.end()) {
    throw RequestError(
        Code::kResourceExhausted,
        text("pages of KV sessions: of another size; allowed: ", kMostClasses, " sizes at a time"));
  }
  while (unused->evict_oldest(true)) {
  }
  const std::set<std::uint32_t> idle = unused->idle_;
  for (const std::uint32_t slab : idle) unused->give_back(slab);
  return *unused;
}

std::size_t PageStore::needed_bytes() const {
  std::size_t sum = 0;
  for (const PageClass& of : classes_) sum += of.slabs_needed() * of.slab_bytes();
  return sum;
}

bool PageStore::promise(PageClass& pages, std::int64_t more) {
  pages.counts_.promised += static_cast<std::size_t>(more);
  if (more < 0 || fits()) return true;
  pages.counts_.promised -= static_cast<std::size_t>(more);
  return false;
}

std::size_t PageStore::free_pages(const PageClass& pages) const {
  const std::size_t others = needed_bytes() - pages.slabs_needed() * pages.slab_bytes();
  const std::size_t left = max_bytes_ > others ? max_bytes_ - others : 0;
  const std::size_t could = left / pages.slab_bytes() * pages.slab_pages_;
  return could > pages.counts_.promised ? could - pages.counts_.promised : 0;
}

bool PageStore::make_room(const PageClass& of, std::size_t bytes) {
  for (PageClass& other : classes_) {
    if (memory_ + bytes <= max_bytes_) break;
    if (&other == &of) continue;
    const std::set<std::uint32_t> idle = other.idle_;
    for (const std::uint32_t slab : idle) {
      if (memory_ + bytes <= max_bytes_) break;
      if (other.slabs_[slab].cached == 0) other.give_back(slab);
    }
  }
  return memory_ + bytes <= max_bytes_;
}

void PageStore::clear_oldest_slab(const PageClass& of) {
  PageClass* found = nullptr;
  std::uint32_t oldest = 0;
  for (PageClass& other : classes_) {
    if (&other == &of) continue;
    for (std::uint32_t slab = 0; slab < other.slabs_.size(); ++slab) {
      const PageClass::Slab& candidate = other.slabs_[slab];
      if (candidate.in_use > 0 || candidate.cached == 0) continue;
      if (found && found->slabs_[oldest].last_used <= candidate.last_used) continue;
      found = &other;
      oldest = slab;
    }
  }
  if (!found) throw std::logic_error("KV sessions: no memory for a page that was promised");
  const std::size_t start = oldest * found->slab_pages_;
  for (std::size_t page = start; page < start + found->slab_pages_; ++page) {
    const PageClass::Page& candidate = found->pages_[page];
    if (!candidate.free && candidate.references == 0) {
      found->evict(static_cast<PageIndex>(page));
    }
  }
}

void PageStore::drop_cached() {
  for (PageClass& of : classes_) {
    while (of.evict_oldest(true)) {
    }
  }
}

bool PageStore::give_back(std::size_t most_slabs) {
  for (PageClass& of : classes_) {
    const std::set<std::uint32_t> idle = of.idle_;
    for (const std::uint32_t slab : idle) {
      if (of.slabs_[slab].cached > 0) continue;
      if (most_slabs-- == 0) return true;
      of.give_back(slab);
    }
  }
  return false;
}

}  // namespace attnserve::sessions
