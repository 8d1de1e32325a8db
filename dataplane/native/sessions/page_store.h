// The memory of all KV sessions: pages of a fixed budget, counted, shared and promised.
//
// Memory. One mapping of address space is reserved at the start; its first byte is the operator's
// `cache`, and a page is named by its offset from there. Pages of one size are a PageClass, an
// array in a part of the mapping of their own. Memory is taken for it, and given back to the
// system, by the slab: as many neighbouring pages as make about `slab_bytes`. The slabs of all
// classes together never have more than `max_bytes`.
//
// A page is in use (a session holds it: references > 0), cached (a published page that no session
// holds, kept until its room is needed) or free.
//
// Promises. `promised` of a class counts the pages that may ever be in use at once, by what
// sessions have been promised; it is raised before pages are taken, and refused if it could not be
// kept:
//
//   sum over classes of  slab size x max(slabs with pages in use, ceil(promised / pages a slab))
//
// never exceeds max_bytes. So take() always finds room: either a page of a slab in use is free or
// only cached, or the sum says that another slab can be had, if need be in place of one of another
// class without a page in use.
//
// Who goes first when room is needed: free pages of the class; memory not used yet, or used by
// empty slabs of other classes; the page of the class that has been cached for longest; then slabs
// of other classes with cached pages only, first the one where the last page became cached longest
// ago. (Where the page that has been cached for longest would bring another slab into use against
// the sum above, the next one is taken.) Of the pages that one session leaves, the deepest count as
// cached first.
//
// Not for threads: KvSessions calls it under its lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <set>
#include <vector>

namespace attnserve::sessions {

class PageStore;
using PageIndex = std::uint32_t;  // within its class
constexpr PageIndex kNoPage = ~PageIndex{0};
constexpr std::int64_t kGivenBack = -1;  // in a table, in place of a page's offset

// Where a published page is found: the keeper of prefixes numbers its blocks.
struct Published {
  static constexpr std::uint32_t kNowhere = ~std::uint32_t{0};
  std::uint32_t block = kNowhere;
  std::uint32_t layer = 0;
};

// What one owner is promised: by its sessions, and as common pages.
struct PageAccount {
  std::size_t bytes = 0;
  std::size_t sessions = 0;  // open
};
using PageAccountPtr = std::shared_ptr<PageAccount>;

struct PageCounts {
  std::size_t in_use = 0, cached = 0;  // pages
  std::size_t promised = 0;            // pages, those in use included
  std::size_t slabs = 0;               // that have memory
  std::size_t slabs_in_use = 0;        // with a page in use
};

class PageClass {
 public:
  PageClass(PageStore& store, std::size_t first, std::size_t page_bytes, std::size_t slab_pages,
            std::size_t most_slabs);

  std::size_t page_bytes() const { return page_bytes_; }
  std::int64_t offset(PageIndex page) const {
    return static_cast<std::int64_t>(first_ + page * page_bytes_);
  }
  PageIndex index(std::int64_t offset) const {
    return static_cast<PageIndex>((static_cast<std::size_t>(offset) - first_) / page_bytes_);
  }

  // A page with one reference, its bytes whatever they were. Within what was promised.
  PageIndex take();
  void share(PageIndex page);  // one reference more; a cached page is in use again
  // One reference less. Without any, a published page is cached, another one free.
  void drop(PageIndex page);
  std::uint32_t references(PageIndex page) const { return pages_[page].references; }

  void publish(PageIndex page, Published where) { pages_[page].where = where; }
  bool published(PageIndex page) const { return pages_[page].where.block != Published::kNowhere; }
  Published where(PageIndex page) const { return pages_[page].where; }
  void withdraw(PageIndex page);  // no longer published: free, if it was cached

  // A common page is promised once, however many sessions hold it, and only while one does, to the
  // owner of them all; the promises of sessions do not include it. Changes no promise of a session.
  bool common(PageIndex page) const { return pages_[page].common_of != nullptr; }
  void set_common(PageIndex page, const PageAccountPtr& of);
  void set_own(PageIndex page);

  const PageCounts& counts() const { return counts_; }

 private:
  friend class PageStore;
  enum class Place : std::uint8_t { kAbsent, kFull, kPartial, kIdle };
  struct Page {
    std::uint32_t references = 0;
    bool free = true;
    PageAccountPtr common_of;
    Published where;
    PageIndex before = kNoPage, next = kNoPage;  // among the cached; `next` among a slab's free
  };
  struct Slab {
    std::uint32_t in_use = 0, cached = 0;
    PageIndex free = kNoPage;     // the first of its free pages
    std::uint64_t last_used = 0;  // when its last page became cached
    Place place = Place::kAbsent;
  };

  void count_common(PageIndex page, bool more);
  Slab& slab_of(PageIndex page) { return slabs_[page / slab_pages_]; }
  std::size_t slab_bytes() const { return slab_pages_ * page_bytes_; }
  // Slabs that keep the promises, if `more_in_use` slabs come into use.
  std::size_t slabs_needed(std::size_t more_in_use = 0) const;
  void set_place(std::uint32_t slab);
  void give_back(std::uint32_t slab);  // without a page in use or cached
  void use(PageIndex page);            // from free or cached to in use, without a reference yet
  void put_free(PageIndex page);
  void put_cached(PageIndex page);
  void remove_cached(PageIndex page);
  bool may_use_another_slab() const;
  bool evict_oldest(bool anywhere);  // else of slabs in use; false: there is none
  void evict(PageIndex page);
  bool add_slab();  // false: no memory for it without giving up what is cached

  PageStore& store_;
  const std::size_t first_;  // offset of page 0
  const std::size_t page_bytes_, slab_pages_, most_slabs_;
  std::vector<Page> pages_;  // never moves: all that there may be are reserved
  std::vector<Slab> slabs_;
  std::set<std::uint32_t> absent_;                 // slabs that gave their memory back
  std::set<std::uint32_t> partial_;                // with pages in use and free ones
  std::set<std::uint32_t> idle_;                   // with free pages, and none in use
  PageIndex oldest_ = kNoPage, newest_ = kNoPage;  // of the cached
  PageCounts counts_;
};

class PageStore {
 public:
  // Called with a page that is about to be evicted, still published.
  using OnEvict = std::function<void(PageClass&, PageIndex)>;

  // Throws RequestError RESOURCE_EXHAUSTED if the address space cannot be had.
  PageStore(std::size_t max_bytes, std::size_t slab_bytes, OnEvict on_evict);
  ~PageStore();
  PageStore(const PageStore&) = delete;
  PageStore& operator=(const PageStore&) = delete;

  std::byte* cache() { return start_; }
  std::size_t cache_bytes() const { return class_bytes_ * kMostClasses; }  // of address space
  std::size_t max_bytes() const { return max_bytes_; }

  // Pages of so many bytes, a multiple of 64; they are there as long as any are promised. Throws
  // RequestError RESOURCE_EXHAUSTED beyond kMostClasses sizes, or if not even one page fits.
  PageClass& of_size(std::size_t page_bytes);

  // Promises so many pages more (or fewer). False, and nothing is changed, if they cannot be had.
  bool promise(PageClass& pages, std::int64_t more);
  // Are all promises kept with what is in use now? For those who share cached pages first.
  bool fits() const { return needed_bytes() <= max_bytes_; }
  std::size_t free_pages(const PageClass& pages) const;  // that could be promised besides

  std::uint64_t evictions() const { return evictions_; }  // of cached pages, ever
  std::size_t memory_bytes() const { return memory_; }    // of slabs that have memory
  const std::deque<PageClass>& classes() const { return classes_; }
  void drop_cached();  // evicts all that is cached
  // Gives the memory of empty slabs back to the system, of at most so many. True: there are more.
  bool give_back(std::size_t most_slabs);

 private:
  friend class PageClass;
  static constexpr std::size_t kMostClasses = 32;

  std::size_t needed_bytes() const;
  PageClass& clear_unused_class();
  bool make_room(const PageClass& of, std::size_t bytes);  // by empty slabs of other classes
  void clear_oldest_slab(const PageClass& of);             // of another class, with what is cached

  const std::size_t max_bytes_, slab_bytes_;
  OnEvict on_evict_;
  std::size_t class_bytes_ = 0, reserved_ = 0;
  void* mapped_ = nullptr;
  std::byte* start_ = nullptr;  // in what is mapped, where a large page begins
  std::size_t memory_ = 0;
  std::uint64_t now_ = 0;  // counts what becomes cached
  std::uint64_t evictions_ = 0;
  std::deque<PageClass> classes_;
};

}  // namespace attnserve::sessions
