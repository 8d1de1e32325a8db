// One page of tokens in all layers of a session that keep every token: what forks share as one.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "sessions/page_store.h"

namespace attnserve::sessions {

// Has a reference of each of its pages. Sessions that hold it together leave it as it is: whoever
// writes to a page takes a copy of the block first, and then, as others hold the page too, of the
// page. Guarded by the lock of KvSessions, its destruction included.
class KvBlock {
 public:
  KvBlock(PageClass& pages, std::size_t layers) : pages_(pages), of_layer_(layers, kNoPage) {}
  KvBlock(const KvBlock& other) : pages_(other.pages_), of_layer_(other.of_layer_) {
    for (const PageIndex page : of_layer_) {
      if (page != kNoPage) pages_.share(page);
    }
  }
  KvBlock& operator=(const KvBlock&) = delete;
  ~KvBlock() {
    for (const PageIndex page : of_layer_) {
      if (page != kNoPage) pages_.drop(page);
    }
  }

  PageIndex page(std::size_t layer) const { return of_layer_[layer]; }  // kNoPage: none yet
  // With the reference that comes with it; of the one before it the caller has disposed.
  void put(std::size_t layer, PageIndex page) { of_layer_[layer] = page; }

 private:
  PageClass& pages_;
  std::vector<PageIndex> of_layer_;
};

using KvBlockPtr = std::shared_ptr<KvBlock>;

}  // namespace attnserve::sessions
