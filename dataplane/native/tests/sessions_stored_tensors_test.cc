#include <doctest/doctest.h>

#include <thread>
#include <vector>

#include "base/status.h"
#include "sessions/stored_tensors.h"

using namespace attnserve;
using namespace attnserve::sessions;
using namespace std::chrono_literals;

namespace {

StoredTensor tensor_of(std::size_t size) {
  return {DataType::kBool, Shape{static_cast<std::int64_t>(size)}, Bytes::allocate(size)};
}

constexpr std::string_view kMe = "@me";

Stored put(StoredTensors& store, std::size_t size, Duration lease = 0s) {
  Room room = store.begin();
  room.claim(size);
  return store.put(tensor_of(size), std::move(room), lease, kMe);
}

template <class Step>
Status refusal(const Step& step) {
  try {
    step();
  } catch (const RequestError& error) {
    return error.status();
  }
  return {};
}

}  // namespace

TEST_CASE("what was put is found under its handle") {
  StoredTensors store(1000, 10s, 20s);
  StoredTensor tensor = tensor_of(6);
  tensor.elements.data()[5] = std::byte{7};
  Room room = store.begin();
  room.claim(6);
  const Stored stored = store.put(std::move(tensor), std::move(room), 3s, kMe);
  CHECK(stored.handle.size() == 22);
  CHECK(stored.lease == 3s);
  CHECK(stored.byte_size == 6);
  const StoredTensorPtr found = store.get(stored.handle, kMe, "key.stored");
  CHECK(found->shape == Shape{6});
  CHECK(found->elements.data()[5] == std::byte{7});
  CHECK(put(store, 6).handle != stored.handle);
}

TEST_CASE("a lease is the default unless asked for, and bounded") {
  StoredTensors store(1000, 10s, 20s);
  CHECK(put(store, 1).lease == 10s);
  CHECK(put(store, 1, 5s).lease == 5s);
  CHECK(put(store, 1, 1000h).lease == 20s);
  const std::string handle = put(store, 1, 5s).handle;
  CHECK(store.renew(handle, kMe, 0s).lease == 5s);
  CHECK(store.renew(handle, kMe, 7s).lease == 7s);
  CHECK(store.renew(handle, kMe, 1000h).lease == 20s);
  CHECK(store.renew(handle, kMe, 0s).byte_size == 1);
}

TEST_CASE("an unknown handle is not found, an empty one is wrong in itself") {
  StoredTensors store(1000, 10s, 20s);
  const std::string wrong = std::string(100, 'x') + "'";
  const Status unknown = refusal([&] { store.get(wrong, kMe, "key.stored"); });
  CHECK(unknown.code == Code::kNotFound);
  CHECK(unknown.message == "key.stored: given '" + std::string(80, 'x') +
                               "'; no such tensor is kept: never put here, dropped, or its lease "
                               "ran out");
  CHECK(refusal([&] { store.renew("x", kMe, 1s); }).code == Code::kNotFound);
  CHECK(refusal([&] {
          store.drop("x", kMe);
        }).message.starts_with("handle: given 'x'; no such tensor"));
  const Status empty = refusal([&] { store.get("", kMe, "key.stored"); });
  CHECK(empty.code == Code::kInvalidArgument);
  CHECK(empty.message == "key.stored: given nothing; allowed: a handle that PutTensor answered");
}

TEST_CASE("a dropped tensor is gone, while who uses it keeps it") {
  StoredTensors store(1000, 10s, 20s);
  const Stored stored = put(store, 64);
  const StoredTensorPtr used = store.get(stored.handle, kMe, "key.stored");
  store.drop(stored.handle, kMe);
  CHECK(refusal([&] { store.get(stored.handle, kMe, "x"); }).code == Code::kNotFound);
  CHECK(refusal([&] { store.drop(stored.handle, kMe); }).code == Code::kNotFound);
  CHECK(store.bytes() == 0);
  CHECK(used->elements.size() == 64);
}

TEST_CASE("a tensor is there for the caller that stored it alone") {
  StoredTensors store(100, 10s, 20s);
  const Stored stored = put(store, 6);
  for (const std::string_view other : {"@you", "@me2", ""}) {
    const Status status = refusal([&] { store.get(stored.handle, other, "key.stored"); });
    CHECK(status.code == Code::kNotFound);
    // As if it had never been: nobody learns that it is there.
    const std::string never = refusal([&] { store.get("x", other, "key.stored"); }).message;
    CHECK(status.message.substr(status.message.find(';')) == never.substr(never.find(';')));
    CHECK(refusal([&] { store.renew(stored.handle, other, 1s); }).code == Code::kNotFound);
    CHECK(refusal([&] { store.drop(stored.handle, other); }).code == Code::kNotFound);
  }
  CHECK(store.get(stored.handle, kMe, "key.stored")->elements.size() == 6);
}

TEST_CASE("room is bounded and comes back") {
  StoredTensors store(100, 10s, 20s);
  const Stored first = put(store, 80);
  const Status full = refusal([&] { put(store, 30); });
  CHECK(full.code == Code::kResourceExhausted);
  CHECK(full.message ==
        "tensor: 30 bytes, beside 80 that are kept; allowed: 100 together (--max-stored-mib)");
  CHECK(full.retry_after > 9s);
  CHECK(full.retry_after <= 10s);
  CHECK(refusal([&] { store.check_fits(30); }).message == full.message);
  CHECK(refusal([&] { store.check_fits(101); }).retry_after == 0s);
  CHECK(refusal([&] { put(store, 101); }).retry_after == 0s);
  store.check_fits(20);
  store.drop(first.handle, kMe);
  put(store, 100);
  CHECK(store.bytes() == 100);
}

TEST_CASE("room is claimed as bytes come, and given back unless the tensor was stored") {
  StoredTensors store(100, 10s, 20s);
  Room waiting = store.begin();
  CHECK(store.bytes() == 0);
  waiting.claim(60);
  waiting.claim(10);
  CHECK(store.bytes() == 70);
  {
    Room other = store.begin();
    other.claim(20);
    const Status full = refusal([&] { other.claim(30); });
    CHECK(full.message ==
          "tensor: 50 bytes, beside 70 that are kept; allowed: 100 together (--max-stored-mib)");
    CHECK(full.retry_after > 0s);  // though nothing is kept whose lease could end
    CHECK(store.bytes() == 90);
  }
  CHECK(store.bytes() == 70);
  CHECK(refusal([&] { waiting.claim(31); }).retry_after == 0s);  // 101 bytes never fit
  Room moved = std::move(waiting);
  waiting = store.begin();
  CHECK(store.bytes() == 70);
  moved = store.begin();
  CHECK(store.bytes() == 0);
}

TEST_CASE("a tensor counts for what it has, whatever its room claimed") {
  StoredTensors store(100, 10s, 20s);
  Room large = store.begin();
  large.claim(50);
  const Stored small = store.put(tensor_of(10), std::move(large), 0s, kMe);
  CHECK(store.bytes() == 10);
  const Stored unclaimed = store.put(tensor_of(90), store.begin(), 0s, kMe);
  CHECK(store.bytes() == 100);
  CHECK(refusal([&] { store.put(tensor_of(1), store.begin(), 0s, kMe); }).code ==
        Code::kResourceExhausted);
  CHECK(store.bytes() == 100);
  store.drop(small.handle, kMe);
  store.drop(unclaimed.handle, kMe);
  CHECK(store.bytes() == 0);
}

TEST_CASE("what ran out makes room") {
  StoredTensors store(100, 10s, 20s);
  const Stored stored = put(store, 100, 10ms);
  std::this_thread::sleep_for(20ms);
  put(store, 100);
  CHECK(refusal([&] { store.get(stored.handle, kMe, "key.stored"); }).code == Code::kNotFound);
}

TEST_CASE("a lease starts anew with each use") {
  StoredTensors store(100, 10s, 1h);
  // On a busy machine this thread may sleep through a lease: then it is tried with a longer one.
  bool slept_through = true;
  for (Duration lease = 80ms; slept_through; lease *= 2) {
    REQUIRE(lease < 1min);
    const TimePoint began = Clock::now();
    const Stored stored = put(store, 10, lease), unused = put(store, 10, lease);
    slept_through = false;
    bool kept = true;
    TimePoint used = began;
    while (kept && Clock::now() - began < 2 * lease) {
      std::this_thread::sleep_for(lease / 8);
      const TimePoint before = Clock::now();
      kept = refusal([&] { store.get(stored.handle, kMe, "x"); }).ok();
      slept_through |= Clock::now() - used >= lease;
      used = before;
    }
    if (slept_through) continue;
    CHECK(kept);
    CHECK(refusal([&] { store.get(unused.handle, kMe, "x"); }).code == Code::kNotFound);
    std::this_thread::sleep_for(2 * lease);
    CHECK(store.bytes() == 0);
  }
}

TEST_CASE("tensors of no bytes are bounded as well") {
  StoredTensors store(100, 10s, 20s);
  Status status;
  int put_in = 0;
  for (; put_in < 70'000 && status.ok(); ++put_in) {
    status = refusal([&] { store.put({DataType::kFp32, Shape{0}, {}}, store.begin(), 0s, kMe); });
  }
  CHECK(put_in == 65'537);
  CHECK(status.code == Code::kResourceExhausted);
  CHECK(status.retry_after > 0s);
}

TEST_CASE("many threads leave the books balanced") {
  StoredTensors store(10'000, 10s, 20s);
  std::vector<std::thread> threads;
  for (int number = 0; number < 8; ++number) {
    threads.emplace_back([&] {
      for (int count = 0; count < 200; ++count) {
        const Stored stored = put(store, 10, count % 3 == 0 ? 1us : 0us);
        try {
          store.get(stored.handle, kMe, "x");
          store.renew(stored.handle, kMe, 1s);
          store.drop(stored.handle, kMe);
        } catch (const RequestError& error) {
          CHECK(error.status().code == Code::kNotFound);
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::this_thread::sleep_for(1ms);
  CHECK(store.bytes() == 0);
}

TEST_CASE("a caller's tensors are within a part of its own, until they go") {
  StoredTensors store(1000, 10s, 20s);
  ByteBudget own(300);
  ByteBudget others(1000);
  const auto put_in = [&](ByteBudget& part, std::size_t size) {
    Room room = store.begin(&part);
    room.claim(size);
    return store.put(tensor_of(size), std::move(room), 0s, kMe);
  };
  const Stored kept = put_in(own, 200);
  CHECK(own.lent() == 200);
  const Status refused = refusal([&] { put_in(own, 101); });
  CHECK(refused.code == Code::kResourceExhausted);
  CHECK(refused.message.find("--caller-stored-mib") != std::string::npos);
  CHECK(store.bytes() == 200);  // nothing stays claimed
  CHECK(own.lent() == 200);
  put_in(others, 800);
  CHECK(refusal([&] { put_in(own, 50); }).message.find("--max-stored-mib") != std::string::npos);
  store.drop(kept.handle, kMe);
  CHECK(own.lent() == 0);
  put_in(own, 50);
  {
    Room abandoned = store.begin(&own);
    abandoned.claim(100);
  }
  CHECK(own.lent() == 50);
  {
    Room moved = store.begin(&own);
    moved.claim(10);
    Room to = std::move(moved);
    to.claim(5);
  }
  CHECK(own.lent() == 50);
}
