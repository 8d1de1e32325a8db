// Published pages: which block of tokens, of which sessions' model, layers and owner, is where.
//
// A block is one page of tokens in every layer. Its key is made from the key of the block before it
// and the caller's hash of its tokens; the first one's from the owner, the model, the layers and a
// secret of this store. So a key stands for all tokens up to its page, and nobody finds the blocks
// of another owner.
//
// Not for threads: KvSessions calls it under its lock, `root_of` and `append` apart.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "sessions/kv_plan.h"
#include "sessions/kv_spec.h"
#include "sessions/page_store.h"

namespace attnserve::sessions {

using BlockKey = PageHash;

class KvPrefixes {
 public:
  KvPrefixes();

  // Of what the first block's key is made.
  BlockKey root_of(const KvPlan& plan, std::string_view owner) const;
  // Appends the keys of further blocks to those of a chain that begins after `root`.
  static void append(std::vector<BlockKey>& chain, const BlockKey& root,
                     std::span<const PageHash> hashes);

  // How many blocks a session could begin with: the most of which all is there that it needs.
  std::size_t find(const KvPlan& plan, std::span<const BlockKey> chain) const;
  // A layer's page of a block; kNoPage if it is not there.
  PageIndex page(const BlockKey& key, std::size_t layer) const;
  // Unless another page of the same tokens is there.
  void publish(const KvPlanPtr& plan, PageClass& pages, const BlockKey& key, std::size_t layer,
               PageIndex page);
  // Forgets a page, and with a page of a layer without window all of its block, which is of no use
  // without it.
  void withdraw(PageClass& pages, PageIndex page);

 private:
  struct Block {
    BlockKey key;
    KvPlanPtr plan;
    PageClass* pages = nullptr;
    std::vector<PageIndex> of_layer;  // kNoPage: not there
    std::size_t count = 0;
  };
  struct KeyHash {
    std::size_t operator()(const BlockKey& key) const {
      std::size_t hash = 0;
      std::memcpy(&hash, key.data(), sizeof hash);
      return hash;
    }
  };
  const Block* find_block(const BlockKey& key) const;
  void remove(std::uint32_t number, std::size_t layer);

  std::string secret_;
  std::vector<Block> blocks_;
  std::vector<std::uint32_t> unused_;  // of `blocks_`
  std::unordered_map<BlockKey, std::uint32_t, KeyHash> by_key_;
};

}  // namespace attnserve::sessions
