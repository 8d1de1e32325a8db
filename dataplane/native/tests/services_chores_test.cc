#include <doctest/doctest.h>

#include <future>
#include <memory>
#include <vector>

#include "services/chores.h"

namespace attnserve::services {

TEST_CASE("chores are done one after another, on a thread of their own") {
  std::vector<int> done;
  std::thread::id where;
  {
    Chores chores;
    for (int i = 0; i < 100; ++i) {
      CHECK_FALSE(chores.add([&, i] {
        where = std::this_thread::get_id();
        done.push_back(i);
      }));
    }
  }  // does what is left
  REQUIRE(done.size() == 100);
  for (int i = 0; i < 100; ++i) CHECK(done[i] == i);
  CHECK(where != std::this_thread::get_id());
}

TEST_CASE("chores beyond a bound are refused") {
  std::promise<void> begun, release;
  Chores chores;
  REQUIRE_FALSE(chores.add([&] {
    begun.set_value();
    release.get_future().wait();
  }));
  begun.get_future().wait();
  int added = 0;
  std::optional<Status> refused;
  while (!refused && added < 100000) {
    refused = chores.add([] {});
    if (!refused) ++added;
  }
  release.set_value();
  REQUIRE(refused);
  CHECK(refused->code == Code::kResourceExhausted);
  CHECK(refused->message == "requests: 1024 of this kind are waiting; allowed: 1024");
  CHECK(added == 1024);
}

TEST_CASE("what a chore held is let go once it is done, and may ask for more") {
  Chores chores;
  std::promise<bool> refused;
  struct AsksForMore {
    Chores& chores;
    std::promise<bool>& refused;
    ~AsksForMore() {
      refused.set_value(chores.add([] {}).has_value());
    }
  };
  auto held = std::make_shared<AsksForMore>(chores, refused);
  chores.add([held = std::move(held)] {});
  CHECK_FALSE(refused.get_future().get());
}

}  // namespace attnserve::services
