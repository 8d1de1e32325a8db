#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "base/status.h"
#include "sessions/page_layout.h"
#include "sessions/page_store.h"

using namespace attnserve;
using namespace attnserve::sessions;

namespace {

void no_prefix(PageClass& pages, PageIndex page) { pages.withdraw(page); }

PageIndex take_promised(PageStore& store, PageClass& pages) {
  REQUIRE(store.promise(pages, 1));
  return pages.take();
}

void drop_promised(PageStore& store, PageClass& pages, PageIndex page) {
  pages.drop(page);
  store.promise(pages, -1);
}

}  // namespace

TEST_CASE("a page's rows lie one after another, keys, values, then scales") {
  const PageLayout plain{2, 8, 4, CacheType::kFp16, 16};
  CHECK(plain.key_at(plain.row_of(1, 3)) == (16 + 3) * 16);
  CHECK(plain.value_at(plain.row_of(0, 0)) == 2 * 16 * 16);
  CHECK(plain.value_at(plain.row_of(1, 15)) == 2 * 16 * 16 + 31 * 8);
  CHECK(plain.page_bytes() == 2 * 16 * (16 + 8));
  const PageLayout scaled{3, 5, 7, CacheType::kInt8, 16};
  CHECK(scaled.key_scale_at(0) == 48 * 12);
  CHECK(scaled.value_scale_at(2) == 48 * 12 + 48 * 4 + 8);
  CHECK(scaled.page_bytes() == 960);
  CHECK(PageLayout{3, 5, 7, CacheType::kFp8, 4}.page_bytes() == 256);  // 240
  const PageLayout latent{1, 12, 8, CacheType::kFp8, 16, true};
  CHECK(latent.key_scale_at(3) == 16 * 12 + 12);
  CHECK(latent.page_bytes() == 256);
  CHECK(PageLayout{1, 16, 8, CacheType::kFp16, 4, true}.page_bytes() == 4 * 16 * 2);
  CHECK(plain.pages(0) == 0);
  CHECK(plain.pages(16) == 1);
  CHECK(plain.pages(17) == 2);
}

TEST_CASE("pages are within the budget and do not overlap") {
  PageStore store(64 << 10, 4096, no_prefix);
  PageClass& small = store.of_size(960);
  PageClass& large = store.of_size(8192);
  CHECK(&store.of_size(960) == &small);
  std::vector<std::pair<std::int64_t, std::int64_t>> ranges;
  for (int count = 0; count < 4; ++count) {
    const std::int64_t offset = large.offset(take_promised(store, large));
    ranges.emplace_back(offset, offset + 8192);
  }
  while (store.promise(small, 1)) {
    const PageIndex page = small.take();
    CHECK(small.index(small.offset(page)) == page);
    std::fill_n(store.cache() + small.offset(page), 960, std::byte{1});
    ranges.emplace_back(small.offset(page), small.offset(page) + 960);
  }
  std::ranges::sort(ranges);
  for (std::size_t index = 0; index + 1 < ranges.size(); ++index) {
    CHECK(ranges[index].second <= ranges[index + 1].first);
  }
  CHECK(small.counts().in_use == 4 * 8);  // slabs of 4; 8 of them fit beside the large ones
  CHECK(store.memory_bytes() <= 64 << 10);
  CHECK(store.free_pages(small) == 0);
  CHECK_THROWS_AS(store.of_size(128 << 10), RequestError);
}

TEST_CASE("slabs without pages go from one size to another") {
  PageStore store(64 << 10, 4096, no_prefix);
  PageClass& small = store.of_size(1024);
  PageClass& large = store.of_size(4096);
  std::vector<PageIndex> pages;
  while (store.promise(small, 1)) pages.push_back(small.take());
  CHECK(pages.size() == 64);
  CHECK_FALSE(store.promise(large, 1));
  // One page of each slab is still in use: there is room, but none for another size.
  for (std::size_t index = 0; index < pages.size(); ++index) {
    if (index % 4 > 0) drop_promised(store, small, pages[index]);
  }
  CHECK(store.free_pages(small) == 48);
  CHECK_FALSE(store.promise(large, 1));
  drop_promised(store, small, pages[4]);
  take_promised(store, large);
  CHECK_FALSE(store.promise(large, 1));
  CHECK(store.memory_bytes() == 64 << 10);
}

TEST_CASE("sizes that nobody is promised pages of make way for others") {
  PageStore store(64 << 10, 4096, no_prefix);
  for (std::size_t size = 64; size <= 200 * 64; size += 64) {
    PageClass& pages = store.of_size(size);
    const PageIndex page = take_promised(store, pages);
    pages.publish(page, {0, 0});
    std::fill_n(store.cache() + pages.offset(page), size, std::byte{1});
    drop_promised(store, pages, page);
  }
  CHECK(store.classes().size() == 32);
  for (std::size_t size = 64; size <= 32 * 64; size += 64) {
    take_promised(store, store.of_size(size));
    if (store.memory_bytes() > 15 * 4096) break;
  }
  CHECK(store.memory_bytes() <= 64 << 10);
}

TEST_CASE("a published page stays until room is needed") {
  std::vector<PageIndex> evicted;
  PageStore store(16 << 10, 4096, [&](PageClass&, PageIndex page) { evicted.push_back(page); });
  PageClass& pages = store.of_size(4096);
  PageClass& others = store.of_size(2048);
  std::vector<PageIndex> held;
  for (std::uint32_t index = 0; index < 4; ++index) {
    held.push_back(take_promised(store, pages));
    pages.publish(held[index], {index, 0});
  }
  for (const std::uint32_t index : {2U, 0U, 1U, 3U}) drop_promised(store, pages, held[index]);
  CHECK(pages.counts().cached == 4);
  pages.share(held[0]);  // and promised
  CHECK(store.promise(pages, 1));
  CHECK(pages.counts().cached == 3);
  take_promised(store, pages);
  CHECK(evicted == std::vector<PageIndex>{held[2]});
  take_promised(store, others);
  CHECK(evicted == std::vector<PageIndex>{held[2], held[1]});
  drop_promised(store, pages, held[0]);
  CHECK(store.evictions() == 2);
  store.drop_cached();
  CHECK(pages.counts().cached == 0);
}

TEST_CASE("whatever is promised can be had, whichever sizes and orders") {
  std::mt19937 random(std::random_device{}());
  PageStore store(256 << 10, 8192, no_prefix);
  struct Held {
    std::vector<PageIndex> pages;
    std::int64_t promised = 0;
  };
  const std::vector<PageClass*> classes = {&store.of_size(512), &store.of_size(1536),
                                           &store.of_size(2048), &store.of_size(20480)};
  std::vector<std::vector<Held>> users(classes.size(), std::vector<Held>(6));
  std::uint32_t published = 0;
  for (int turn = 0; turn < 30000; ++turn) {
    const std::size_t number = random() % classes.size();
    PageClass& pages = *classes[number];
    Held& user = users[number][random() % 6];
    const auto held = static_cast<std::int64_t>(user.pages.size());
    switch (random() % 5) {
      case 0:
        if (const std::int64_t more = 1 + random() % 40; store.promise(pages, more)) {
          user.promised += more;
        }
        break;
      case 1:
        if (user.promised > held) {
          const std::int64_t less =
              1 +
              static_cast<std::int64_t>(random() % static_cast<std::size_t>(user.promised - held));
          store.promise(pages, -less);
          user.promised -= less;
        }
        break;
      case 2:
      case 3:
        for (std::int64_t more = held; more < user.promised; ++more) {
          user.pages.push_back(pages.take());
        }
        break;
      default:
        std::shuffle(user.pages.begin(), user.pages.end(), random);
        for (std::size_t drops = random() % (user.pages.size() + 1); drops > 0; --drops) {
          if (random() % 2 == 0) pages.publish(user.pages.back(), {published++, 0});
          pages.drop(user.pages.back());
          user.pages.pop_back();
        }
    }
    if (random() % 100 == 0) store.give_back(2);
    CHECK(store.fits());
    REQUIRE(store.memory_bytes() <= store.max_bytes());
  }
  for (std::size_t number = 0; number < classes.size(); ++number) {
    for (Held& user : users[number]) {
      for (const PageIndex page : user.pages) classes[number]->drop(page);
      store.promise(*classes[number], -user.promised);
    }
  }
  store.drop_cached();
  while (store.give_back(10)) {
  }
  CHECK(store.memory_bytes() == 0);
}
