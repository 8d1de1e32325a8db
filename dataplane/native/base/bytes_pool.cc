#include "base/bytes_pool.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <mutex>
#include <new>

#include "base/memory.h"
#include "base/never_destroyed.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(memory_sanitizer) || \
    __has_feature(coverage_sanitizer)
#define ATTNSERVE_POOL_OFF
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION)
#define ATTNSERVE_POOL_OFF
#endif

namespace attnserve {

namespace {

// Sanitizers see the use of freed memory only if it is truly freed.
#ifdef ATTNSERVE_POOL_OFF
constexpr bool kPooling = false;
#else
constexpr bool kPooling = true;
#endif

// Size classes: eight to each power of two, so that a block is at most 1/8 larger than asked for.
constexpr unsigned kSmallestBits = 8;  // 256 bytes; less is rare and costs about the same
constexpr unsigned kLargestBits = 26;  // 64 MiB; the system maps more at little cost per byte
constexpr unsigned kSteps = 8;
constexpr std::size_t kClasses = (kLargestBits - kSmallestBits) * kSteps + 1;

// Kept at most, all classes together: the messages of two callers at 4,096 positions of 8 heads by
// 64 (24 MiB in, 8 MiB out), a burst of shorter ones likewise, and little beside a model's weights.
constexpr std::size_t kMostPooled = std::size_t{128} << 20;

struct SizeClass {
  std::size_t index;
  std::size_t capacity;
};

// For 1 <= size <= 64 MiB.
SizeClass class_of(std::size_t size) {
  if (size <= std::size_t{1} << kSmallestBits) return {0, std::size_t{1} << kSmallestBits};
  const std::size_t below = size - 1;
  const unsigned power = static_cast<unsigned>(std::bit_width(below)) - 1;
  const unsigned shift = power - 3;  // a step is 2^power / 8
  const std::size_t step = (below >> shift) & (kSteps - 1);
  return {(power - kSmallestBits) * kSteps + step + 1, (kSteps + step + 1) << shift};
}

// Blocks from here on begin and end at pages of 2 MiB and ask for them: filling 8 MiB that are new
// took 13.8 ms by pages of 4 KiB and 0.3 ms by these, 32 MiB 49 and 3 ms.
constexpr std::size_t kHugeFrom = std::size_t{4} << 20;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::size_t whole_huge_pages(std::size_t size) {
  return (size + kHugePage - 1) / kHugePage * kHugePage;
}

void* map_huge(std::size_t size) {
  if (size > std::numeric_limits<std::size_t>::max() - 2 * kHugePage) return nullptr;
  const std::size_t whole = whole_huge_pages(size), more = whole + kHugePage;
  void* memory = mmap(nullptr, more, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  auto* first = static_cast<std::byte*>(memory);
  const std::size_t before = -reinterpret_cast<std::uintptr_t>(first) % kHugePage;
  std::byte* aligned = first + before;
  if (before > 0) munmap(first, before);
  munmap(aligned + whole, more - before - whole);
  madvise(aligned, size, MADV_HUGEPAGE);  // where the system has none, ordinary pages do
  return aligned;
}

class HostSource final : public BytesSource {
 public:
  void* allocate(std::size_t size) override {
    if (maps(size)) return map_huge(size);
    void* memory = nullptr;
    return posix_memalign(&memory, kAlignment, size) == 0 ? memory : nullptr;
  }
  void release(void* memory, std::size_t size) override {
    if (maps(size)) {
      munmap(memory, whole_huge_pages(size));
    } else {
      std::free(memory);
    }
  }

 private:
  // Sanitizers watch what comes from malloc alone.
  static bool maps(std::size_t size) { return kPooling && size >= kHugeFrom; }
};

// What a free block holds: its neighbours. New ones come to the front and are taken from there,
// while they are still in the cache; what was not used for long is at the back.
struct FreeBlock {
  FreeBlock* newer;
  FreeBlock* older;
};

struct FreeList {
  std::mutex mutex;  // guards all below
  FreeBlock* newest = nullptr;
  FreeBlock* oldest = nullptr;
  std::size_t count = 0;
  // The fewest blocks there were since the last trim, and between the two before: so many at the
  // back were never taken.
  std::size_t fewest = 0;
  std::size_t fewest_before = 0;

  void push(std::byte* memory) {
    auto* block = new (memory) FreeBlock{nullptr, newest};
    (newest == nullptr ? oldest : newest->newer) = block;
    newest = block;
    ++count;
  }

  std::byte* pop() {
    FreeBlock* block = newest;
    if (block == nullptr) return nullptr;
    newest = block->older;
    (newest == nullptr ? oldest : newest->newer) = nullptr;
    fewest = std::min(fewest, --count);
    return reinterpret_cast<std::byte*>(block);
  }

  // Cuts off the last `many` blocks; the first of them, linked by `older`.
  FreeBlock* cut_oldest(std::size_t many) {
    if (many == 0) return nullptr;
    FreeBlock* first = oldest;
    for (std::size_t passed = 1; passed < many; ++passed) first = first->newer;
    oldest = first->newer;
    (oldest == nullptr ? newest : oldest->older) = nullptr;
    count -= many;
    return first;
  }
};

// Never destroyed, none of it: Bytes in statics and on other threads may outlast main.
constinit std::array<FreeList, kClasses> free_lists;
constinit std::atomic<std::size_t> pooled{0};
std::atomic<BytesSource*> current_source{nullptr};

BytesSource& host_source() {
  static NeverDestroyed<HostSource> host;
  return *host;
}

BytesSource& source() {
  BytesSource* set = current_source.load(std::memory_order_acquire);
  return set == nullptr ? host_source() : *set;
}

std::size_t capacity_of_class(std::size_t index) {
  if (index == 0) return std::size_t{1} << kSmallestBits;
  const std::size_t power = (index - 1) / kSteps + kSmallestBits;
  return (kSteps + (index - 1) % kSteps + 1) << (power - 3);
}

void release_all(FreeBlock* first, std::size_t capacity) {
  while (first != nullptr) {
    FreeBlock* next = first->older;
    source().release(first, capacity);
    pooled.fetch_sub(capacity, std::memory_order_relaxed);
    first = next;
  }
}

void release_pool() {
  for (std::size_t index = 0; index < kClasses; ++index) {
    FreeBlock* first = nullptr;
    {
      FreeList& list = free_lists[index];
      const std::scoped_lock lock(list.mutex);
      first = list.cut_oldest(list.count);
      list.fewest = list.fewest_before = 0;
    }
    release_all(first, capacity_of_class(index));
  }
}

}  // namespace

PoolBlock pool_take(std::size_t size) {
  if (size > std::size_t{1} << kLargestBits) {
    return {static_cast<std::byte*>(source().allocate(size)), size};
  }
  const auto [index, capacity] = class_of(size);
  {
    FreeList& list = free_lists[index];
    const std::scoped_lock lock(list.mutex);
    if (std::byte* memory = list.pop()) {
      pooled.fetch_sub(capacity, std::memory_order_relaxed);
      return {memory, capacity};
    }
  }
  const std::size_t exact = kPooling ? capacity : size;  // a sanitizer guards the very end
  if (void* memory = source().allocate(exact)) return {static_cast<std::byte*>(memory), exact};
  // What other sizes keep may be what this one lacks.
  release_pool();
  return {static_cast<std::byte*>(source().allocate(exact)), exact};
}

void pool_give_back(PoolBlock block) noexcept {
  if (kPooling && block.capacity <= std::size_t{1} << kLargestBits) {
    const std::size_t before = pooled.fetch_add(block.capacity, std::memory_order_relaxed);
    if (before + block.capacity <= kMostPooled) {
      FreeList& list = free_lists[class_of(block.capacity).index];
      const std::scoped_lock lock(list.mutex);
      list.push(block.memory);
      return;
    }
    pooled.fetch_sub(block.capacity, std::memory_order_relaxed);
  }
  source().release(block.memory, block.capacity);
}

void trim_bytes_pool() {
  for (std::size_t index = 0; index < kClasses; ++index) {
    FreeBlock* idle = nullptr;
    {
      FreeList& list = free_lists[index];
      const std::scoped_lock lock(list.mutex);
      const std::size_t many = std::min(list.fewest, list.fewest_before);
      idle = list.cut_oldest(many);
      list.fewest_before = list.fewest - many;
      list.fewest = list.count;
    }
    release_all(idle, capacity_of_class(index));
  }
}

std::size_t pooled_bytes() { return pooled.load(std::memory_order_relaxed); }

void set_bytes_source(std::unique_ptr<BytesSource> replacement) {
  release_pool();
  const std::unique_ptr<BytesSource> replaced(
      current_source.exchange(replacement.release(), std::memory_order_acq_rel));
}

}  // namespace attnserve
