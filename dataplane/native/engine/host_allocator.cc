#include "engine/host_allocator.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "base/bytes_pool.h"
#include "base/memory.h"

namespace attnserve::engine {
namespace {

struct PooledAllocator : ort::HostAllocator {
  const ort::MemoryInfo* memory_info = nullptr;
};

// The pool keeps no blocks as large as this. They come from the system in huge pages, if it has
// them: a page fault every 4 KiB would take longer than computing what is written there.
constexpr std::size_t kHuge = std::size_t{64} << 20;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

// In front of each block, as large as its alignment.
struct Note {
  std::size_t capacity;  // of the pool's block; 0: not the pool's
};
constexpr std::size_t kNoteBytes = kAlignment;
static_assert(sizeof(Note) <= kNoteBytes);

std::byte* noted(void* block, std::size_t capacity) {
  const Note note{capacity};
  std::memcpy(block, &note, sizeof note);
  return static_cast<std::byte*>(block) + kNoteBytes;
}

// nullptr: there is none.
void* take(std::size_t size) {
  if (size > SIZE_MAX - kNoteBytes - kHugePage) return nullptr;
  if (size >= kHuge) {
    const std::size_t whole = (size + kNoteBytes + kHugePage - 1) / kHugePage * kHugePage;
    void* memory = std::aligned_alloc(kHugePage, whole);
    if (memory == nullptr) return nullptr;
    (void)madvise(memory, whole, MADV_HUGEPAGE);  // a wish: small pages do as well
    return noted(memory, 0);
  }
  const PoolBlock block = pool_take(size + kNoteBytes);
  return block.memory == nullptr ? nullptr : noted(block.memory, block.capacity);
}

// ONNX Runtime's kernels do not look whether they were given memory: they count on std::bad_alloc,
// as its own allocator throws it, and make a status of it. It comes through ONNX Runtime's C++
// alone.
void* allocate(ort::HostAllocator*, std::size_t size) {
  void* memory = take(size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void give_back(ort::HostAllocator*, void* memory) {
  if (memory == nullptr) return;
  std::byte* block = static_cast<std::byte*>(memory) - kNoteBytes;
  Note note{};
  std::memcpy(&note, block, sizeof note);
  if (note.capacity == 0) {
    std::free(block);
  } else {
    pool_give_back({block, note.capacity});
  }
}

const ort::MemoryInfo* info_of(const ort::HostAllocator* allocator) {
  return static_cast<const PooledAllocator*>(allocator)->memory_info;
}

}  // namespace

ort::HostAllocator* host_allocator(const ort::MemoryInfo* info) {
  auto* made = new PooledAllocator;  // never destroyed: see above
  made->version = ort::kApiVersion;
  made->allocate = allocate;
  made->free = give_back;
  made->info = info_of;
  made->memory_info = info;
  return made;
}

}  // namespace attnserve::engine
