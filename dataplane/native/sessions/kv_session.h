// One session: its block tables, and what it is promised. Guarded by the lock of KvSessions, which
// alone knows it; while `users` is not 0, its tables change only by whoever they are.
//
// Layers without window, not cross, have their pages in blocks, so that a fork shares as many
// blocks as there are pages in one layer; their tables are made from the blocks layer by layer.
//
// What is promised, per layer (`charge`): without a window, pages for as many tokens as are
// reserved or there, those below `common_pages` apart, which are common: promised once for all
// sessions that hold them. With a window: as many as the window needs at most, shared ones
// included. Of a cross layer: what its keys take, until they are common. A page that is shared but
// not common, such as the last one of a fork, is in the promise of each that shares it, so that
// each can copy it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/clock.h"
#include "sessions/kv_block.h"
#include "sessions/kv_plan.h"
#include "sessions/kv_prefixes.h"
#include "sessions/kv_spec.h"
#include "sessions/page_store.h"

namespace attnserve::sessions {

class KvStep;

class KvSession {
 public:
  using Table = std::vector<std::int64_t>;  // offset of each page, or kGivenBack

  KvSession(KvPlanPtr plan, PageStore& store, KvPrefixes& prefixes, PageAccountPtr account);

  const KvPlan& plan() const { return *plan_; }
  const KvPlanPtr& plan_ptr() const { return plan_; }
  const Table& table(std::size_t layer) const { return tables_[layer]; }  // since it has grown
  // Pages of a layer, and the offset of one, or kGivenBack.
  std::size_t page_count(std::size_t layer) const {
    return in_blocks(layer) ? blocks_.size() : tables_[layer].size();
  }
  std::int64_t page(std::size_t layer, std::size_t number) const {
    return in_blocks(layer) ? pages_.offset(blocks_[number]->page(layer)) : tables_[layer][number];
  }
  const std::byte* data(std::int64_t offset) const { return store_.cache() + offset; }
  std::byte* data(std::int64_t offset) { return store_.cache() + offset; }
  // Keys of a layer once the step, if it is in one, has added its own.
  std::uint64_t keys(std::size_t layer) const;

  bool idle() const { return !in_step && tree.empty(); }
  // Whoever asks for it has to wait until it is known where it is.
  bool leaves() const { return leaving && idle(); }

  // Pages to be promised for `length` tokens and a step of `added` more.
  std::size_t charge(std::uint64_t length, std::uint64_t added) const;
  std::size_t charged() const { return charged_; }
  PageClass& pages() { return pages_; }
  PageAccount& account() { return *account_; }  // of its owner
  // Promises so many pages more (or fewer) to its owner, of whichever session they are. False, and
  // nothing is changed, if they cannot be had.
  bool promise(std::int64_t more);
  // Makes the promise what `charge` says. False, and unchanged, if it cannot be had.
  bool recharge();
  // The caller has promised what `charge` says.
  void set_charged(std::size_t charge) { charged_ = charge; }

  // Begins with the first blocks of its chain: shares their pages. For a session without any.
  void adopt(std::size_t blocks);
  void forget_prefix();  // once released again
  // Begins as another session's first tokens, and with its cross keys.
  void adopt(KvSession& other, std::uint64_t tokens);
  // Pages for an imported session: as many tokens as `length` says, without those that its windows
  // gave back. Within the promise.
  void provide(const std::vector<std::uint32_t>& first_pages);

  // The pages of a layer for the step's new keys, its own to write to. True: a page was copied.
  bool grow(std::size_t layer);
  // A session's tokens from there on are no more. `length` and `charge` are the caller's business.
  void cut(std::uint64_t tokens);
  void cut_cross();
  // Of tokens that are to be cut to: common pages that only this session holds.
  std::size_t common_alone(std::uint64_t tokens) const;
  // The window's keys are there for a query after so many tokens.
  bool window_holds(std::uint64_t tokens) const;
  std::size_t first_page(std::size_t group) const { return first_pages_[group]; }
  // Gives back what no later query sees.
  void slide();
  // Publishes the pages from chain.size() on under these keys, and appends them.
  void publish(const std::vector<BlockKey>& keys);
  // Gives everything back.
  void release();

  std::string id, owner;
  std::size_t most_of_owner = 0;  // sessions that its owner may have; 0: no bound
  BlockKey root{};                // of its chain
  std::vector<BlockKey> chain;    // keys of its first full pages
  std::uint64_t length = 0, max_tokens = 0, reserved_tokens = 0;
  std::uint64_t cross_length = 0, cross_tokens = 0;  // keys there, at most
  std::uint64_t added = 0;         // new tokens of the step that it is in, or of its tree
  std::uint64_t cross_added = 0;   // likewise
  bool in_step = false;            // or something else that others must wait for
  bool frozen = false;             // a snapshot: takes no steps
  bool leaving = false;            // for another server, once nothing of it is under way
  std::uint64_t stream = 0;        // by which its owner used it last; 0: none
  std::vector<std::int32_t> tree;  // waits for commit, if not empty
  std::uint64_t mark = 0;          // the last step that named it
  std::size_t users = 0;           // who read or write its pages at this moment
  bool gone = false;               // closed, expired or moved
  Duration lease{0};
  TimePoint expires = kNever;
  std::multimap<TimePoint, std::shared_ptr<KvSession>>::iterator expiry;  // at `expires` or before

 private:
  std::size_t window_charge(const WindowGroup& group, std::uint64_t tokens,
                            std::uint64_t step) const;
  PageIndex index(std::int64_t offset) const { return pages_.index(offset); }
  bool in_blocks(std::size_t layer) const {
    const LayerSpec& of = plan_->spec.layers[layer];
    return of.window < 0 && !of.cross;
  }
  void make_common(std::uint64_t blocks);
  void make_own(PageIndex page);
  PageIndex owned(PageIndex page, std::size_t tokens);
  bool own_last(std::size_t layer, std::size_t number, std::size_t tokens);
  void fill_table(std::size_t layer, std::size_t pages);
  void drop_from(Table& table, std::size_t page);
  void drop_from(std::size_t page);

  KvPlanPtr plan_;
  PageStore& store_;
  KvPrefixes& prefixes_;
  const PageAccountPtr account_;
  PageClass& pages_;
  std::vector<KvBlockPtr> blocks_;
  std::vector<Table> tables_;  // of layers in blocks: as far as they have been asked for
  std::vector<std::size_t>
      first_pages_;               // of each window: the first page there after the kept ones
  std::size_t common_pages_ = 0;  // of each layer without window
  bool cross_common_ = false;
  std::size_t charged_ = 0;
};

using KvSessionPtr = std::shared_ptr<KvSession>;

}  // namespace attnserve::sessions
