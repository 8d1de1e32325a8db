#include <doctest/doctest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <map>
#include <thread>
#include <vector>

#include "base/memory.h"
#include "base/random.h"
#include "base/status.h"

using namespace attnserve;

namespace {

// Whether freed memory is kept at all: not where a sanitizer looks for its use.
bool pooling() {
  {
    const Bytes bytes = Bytes::allocate(256);
  }
  return pooled_bytes() > 0;
}

void empty_pool() {
  for (int count = 0; count < 3; ++count) trim_bytes_pool();
}

// Host memory, but only `left` times; knows what it lent and checks what comes back.
class Counting final : public BytesSource {
 public:
  explicit Counting(int left, std::map<void*, std::size_t>& lent) : left_(left), lent_(lent) {}
  void* allocate(std::size_t size) override {
    if (left_ == 0) return nullptr;
    --left_;
    void* memory = std::aligned_alloc(kAlignment, (size + 63) / 64 * 64);
    lent_[memory] = size;
    return memory;
  }
  void release(void* memory, std::size_t size) override {
    CHECK(lent_.at(memory) == size);
    lent_.erase(memory);
    std::free(memory);
  }

 private:
  int left_;
  std::map<void*, std::size_t>& lent_;
};

}  // namespace

TEST_CASE("a budget lends what it has and no more") {
  ByteBudget budget(100);
  CHECK(budget.take(60));
  CHECK_FALSE(budget.take(41));
  CHECK_FALSE(budget.take(std::numeric_limits<std::size_t>::max()));
  CHECK(budget.lent() == 60);
  CHECK(budget.take(40));
  budget.give_back(100);
  CHECK(budget.lent() == 0);
}

TEST_CASE("a lease is given back once, however it was moved") {
  ByteBudget budget(100);
  {
    Lease first(budget);
    CHECK(first.grow(10));
    CHECK(first.grow(20));
    CHECK_FALSE(first.grow(71));
    CHECK(first.size() == 30);
    Lease second = std::move(first);
    CHECK(budget.lent() == 30);
    Lease third(budget);
    CHECK(third.grow(5));
    third = std::move(second);
    CHECK(budget.lent() == 30);
    third.release();
    CHECK(budget.lent() == 0);
    CHECK(third.grow(1));
  }
  CHECK(budget.lent() == 0);
}

TEST_CASE("a lease that cannot grow says what is in use, and when to ask again") {
  ByteBudget budget(100);
  Lease held(budget), lease(budget);
  REQUIRE(held.grow(60));
  const auto refusal = [&](std::size_t more) {
    try {
      lease.grow_or_throw(more);
    } catch (const RequestError& error) {
      return error.status();
    }
    return Status{};
  };
  const Status full = refusal(50);
  CHECK(full.code == Code::kResourceExhausted);
  CHECK(full.message == "bytes in flight: 60 are in use and 50 more were asked for; allowed: 100");
  CHECK(full.retry_after > std::chrono::microseconds(0));
  CHECK(refusal(101).retry_after == std::chrono::microseconds(0));  // it never fits
  CHECK(refusal(40).ok());
}

TEST_CASE("threads that take and give back leave the books balanced") {
  ByteBudget budget(1000);
  std::vector<std::thread> threads;
  for (int number = 0; number < 4; ++number) {
    threads.emplace_back([&] {
      for (int count = 0; count < 2000; ++count) {
        Lease lease(budget);
        if (lease.grow(400)) CHECK(budget.lent() <= 1000);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(budget.lent() == 0);
}

TEST_CASE("memory of every size is aligned and all of it is writable") {
  for (const std::size_t size : {1UL, 63UL, 255UL, 256UL, 257UL, 4096UL, 5000UL, 1UL << 20,
                                 (1UL << 20) + 1, 64UL << 20, (64UL << 20) + 1}) {
    Bytes bytes = Bytes::allocate(size);
    CHECK(bytes.size() == size);
    CHECK(reinterpret_cast<std::uintptr_t>(bytes.data()) % kAlignment == 0);
    std::memset(bytes.data(), 0x5A, size);
  }
  CHECK(Bytes::allocate(0).empty());
  empty_pool();
}

TEST_CASE("freed memory is used again, and given to the system once nobody wants it") {
  empty_pool();
  if (!pooling()) return;
  empty_pool();
  CHECK(pooled_bytes() == 0);
  const std::byte* first = nullptr;
  {
    const Bytes bytes = Bytes::allocate(100'000);
    first = bytes.data();
  }
  const std::size_t kept = pooled_bytes();
  CHECK(kept >= 100'000);
  CHECK(kept <= 112'500);
  for (int count = 0; count < 5; ++count) {
    CHECK(Bytes::allocate(100'000).data() == first);
    trim_bytes_pool();
    CHECK(pooled_bytes() == kept);
  }
  trim_bytes_pool();
  trim_bytes_pool();
  CHECK(pooled_bytes() == 0);
}

TEST_CASE("the pool is bounded") {
  std::vector<Bytes> held;
  for (int count = 0; count < 40; ++count) held.push_back(Bytes::allocate(8 << 20));
  held.clear();
  CHECK(pooled_bytes() <= std::size_t{128} << 20);
  empty_pool();
  CHECK(pooled_bytes() == 0);
}

TEST_CASE("threads share the pool") {
  std::vector<std::thread> threads;
  for (int number = 0; number < 4; ++number) {
    threads.emplace_back([number] {
      for (std::size_t count = 0; count < 2000; ++count) {
        Bytes bytes = Bytes::allocate(200 + 37 * (count % 60));
        std::memset(bytes.data(), number, bytes.size());
        if (count % 500 == 0) trim_bytes_pool();
        for (std::size_t at = 0; at < bytes.size(); at += 64) {
          REQUIRE(bytes.data()[at] == static_cast<std::byte>(number));
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  empty_pool();
  CHECK(pooled_bytes() == 0);
}

TEST_CASE("moved memory keeps its place and its lease") {
  ByteBudget budget(1000);
  Bytes first = Bytes::allocate(300);
  first.lease = Lease(budget);
  REQUIRE(first.lease.grow(300));
  const std::byte* data = first.data();
  Bytes second = std::move(first);
  CHECK(second.data() == data);
  CHECK(first.empty());
  Bytes third = Bytes::allocate(10);
  third = std::move(second);
  CHECK(third.data() == data);
  CHECK(third.lease.size() == 300);
  third.shrink(7);
  CHECK(third.span().size() == 7);
  {
    const OutMessage message = OutMessage::of(std::move(third));
    CHECK(message.size() == 7);
    CHECK(message.pieces.at(0).bytes.data() == data);
    CHECK(budget.lent() == 300);
  }
  CHECK(budget.lent() == 0);
}

TEST_CASE("memory comes from a source that was put in place, and goes back to it") {
  std::map<void*, std::size_t> lent;
  set_bytes_source(std::make_unique<Counting>(2, lent));
  {
    const Bytes bytes = Bytes::allocate(1000), large = Bytes::allocate(70 << 20);
    CHECK(lent.size() == 2);
    try {
      Bytes::allocate(1000);
      FAIL("was not refused");
    } catch (const RequestError& error) {
      CHECK(error.status().code == Code::kResourceExhausted);
      CHECK(error.status().message == "memory: none is left for this request");
    }
  }
  set_bytes_source(nullptr);
  CHECK(lent.empty());
}

TEST_CASE("what other sizes keep is given up before memory is refused") {
  std::map<void*, std::size_t> lent;
  set_bytes_source(std::make_unique<Counting>(2, lent));
  {
    const Bytes bytes = Bytes::allocate(1000);
  }
  {
    const Bytes bytes = Bytes::allocate(5000);
  }
  CHECK_THROWS_AS(Bytes::allocate(9000), RequestError);
  CHECK(pooled_bytes() == 0);
  CHECK(lent.empty());
  set_bytes_source(nullptr);
}

// Sanitizers need address space of their own, without bound.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define ATTNSERVE_SANITIZED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define ATTNSERVE_SANITIZED
#endif
#endif

#ifndef ATTNSERVE_SANITIZED
TEST_CASE("sizes beyond all memory are refused") {
  CHECK_THROWS_AS(Bytes::allocate(std::numeric_limits<std::size_t>::max()), RequestError);
  CHECK_THROWS_AS(Bytes::allocate(std::size_t{1} << 62), RequestError);
}

TEST_CASE("a process that may have no more memory refuses a request and goes on") {
  const pid_t child = fork();
  if (child == 0) {
    std::size_t pages = 0;  // that are taken already, by the arenas of threads above all
    std::ifstream("/proc/self/statm") >> pages;
    const rlim_t most = pages * static_cast<std::size_t>(getpagesize()) + (std::size_t{256} << 20);
    const rlimit limit{most, most};
    setrlimit(RLIMIT_AS, &limit);
    int refused = 0;
    std::vector<Bytes> held;
    for (int count = 0; count < 100; ++count) {
      try {
        held.push_back(Bytes::allocate(8 << 20));
      } catch (...) {
        const Status status = status_of(std::current_exception());
        if (status.code == Code::kResourceExhausted) ++refused;
        held.clear();
      }
    }
    _exit(refused >= 1 && refused < 10 ? 0 : 1);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
}
#endif

TEST_CASE("random names have the length asked for and differ") {
  CHECK(random_hex(16).size() == 32);
  CHECK(random_hex(16) != random_hex(16));
  CHECK(random_hex(16).find_first_not_of("0123456789abcdef") == std::string::npos);
  CHECK(random_url_safe(16).size() == 22);
  CHECK(random_url_safe(3).size() == 4);
  CHECK(random_url_safe(0).empty());
}
