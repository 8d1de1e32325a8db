#include "sessions/kv_transfer.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "base/random.h"
#include "base/status.h"
#include "base/text.h"
#include "sessions/kv_chunk.h"
#include "sessions/kv_state.h"
#include "sessions/page_rows.h"

namespace attnserve::sessions {

namespace {

// Of a page's bytes, those from `from` on; rows of tokens that are not there are zero.
void copy_page(const PageLayout& layout, const std::byte* page, std::size_t tokens,
               std::size_t from, MutableByteSpan to) {
  if (tokens >= layout.page_tokens && from + to.size() <= layout.value_scale_at(layout.rows())) {
    std::memcpy(to.data(), page + from, to.size());
    return;
  }
  std::vector<std::byte> whole(layout.page_bytes());
  copy_tokens(layout, page, 0, whole.data(), 0, std::min(tokens, layout.page_tokens));
  std::memcpy(to.data(), whole.data() + from, to.size());
}

}  // namespace

PageCursor::PageCursor(const KvSession& session) : session_(&session) { skip(); }

void PageCursor::skip() {
  const std::size_t layers = session_->plan().spec.layers.size();
  for (; layer_ < layers; ++layer_, page_ = 0) {
    const std::size_t count = session_->page_count(layer_);
    while (page_ < count && page() == kGivenBack) ++page_;
    if (page_ < count) return;
  }
  layer_ = kEnd;
}

std::size_t PageCursor::left_in_page() const {
  return session_->plan().spec.layout.page_bytes() - offset_;
}

std::int64_t PageCursor::page() const { return session_->page(layer_, page_); }

std::size_t PageCursor::tokens() const {
  return session_->keys(layer_) - page_ * session_->plan().page_tokens();
}

void PageCursor::advance(std::size_t bytes) {
  offset_ += bytes;
  if (offset_ < session_->plan().spec.layout.page_bytes()) return;
  offset_ = 0;
  ++page_;
  skip();
}

KvExport KvSessions::export_session(std::string_view id, const SessionOwner& owner) {
  const std::scoped_lock lock(state_->mutex);
  const TimePoint now = Clock::now();
  state_->expire(now);
  const KvSessionPtr session = state_->find_idle(id, owner.name, now);
  const KvSessionPtr snapshot = state_->make(session->plan_ptr(), owner);
  snapshot->max_tokens = session->max_tokens;
  snapshot->frozen = true;
  try {
    snapshot->adopt(*session, session->length);
    state_->promise(*snapshot, "session_id", owner, now);
  } catch (...) {
    snapshot->release();
    throw;
  }
  return KvExport(*this, snapshot, session->reserved_tokens, true);
}

KvExport::KvExport(KvSessions& store, std::shared_ptr<KvSession> snapshot, std::uint64_t reserved,
                   bool owns)
    : store_(&store),
      snapshot_(std::move(snapshot)),
      reserved_(reserved),
      owns_(owns),
      at_(*snapshot_) {
  const std::string random = random_hex(kChunkNonceBytes / 2);
  std::memcpy(nonce_.data(), random.data(), kChunkNonceBytes);
}

KvExport::KvExport(KvExport&&) noexcept = default;

KvExport::~KvExport() {
  if (!snapshot_ || !owns_) return;
  const std::scoped_lock lock(store_->state_->mutex);
  snapshot_->release();
}

Bytes KvExport::next(std::size_t most) {
  if (ended_) return {};
  Bytes chunk = index_ == 0 ? describe() : read_pages(most);
  ended_ = at_.ended();
  seal_chunk(chunk, index_++, ended_, nonce_);
  return chunk;
}

Bytes KvExport::describe() const {
  const KvPlan& plan = snapshot_->plan();
  ExportedSession session{plan.spec,
                          snapshot_->length,
                          snapshot_->max_tokens,
                          reserved_,
                          snapshot_->cross_length,
                          snapshot_->cross_tokens,
                          std::vector<std::uint32_t>(plan.spec.layers.size(), 0)};
  for (std::size_t group = 0; group < plan.windows.size(); ++group) {
    for (const std::uint32_t layer : plan.windows[group].layers) {
      session.first_pages[layer] = static_cast<std::uint32_t>(snapshot_->first_page(group));
    }
  }
  return description_chunk(session);
}

Bytes KvExport::read_pages(std::size_t most) {
  const PageLayout& layout = snapshot_->plan().spec.layout;
  Bytes chunk = Bytes::allocate(std::max(most, kChunkHeaderBytes + 1));
  std::size_t filled = kChunkHeaderBytes;
  while (filled < chunk.size() && !at_.ended()) {
    const std::size_t size = std::min(chunk.size() - filled, at_.left_in_page());
    copy_page(layout, std::as_const(*snapshot_).data(at_.page()), at_.tokens(), at_.offset(),
              {chunk.data() + filled, size});
    filled += size;
    at_.advance(size);
  }
  chunk.shrink(filled);
  return chunk;
}

KvImport KvSessions::import_session(const ExportedSession& exported, Growth growth, Duration lease,
                                    const SessionOwner& owner,
                                    std::span<const PageHash> prefix_hashes) {
  if (exported.spec.layout.page_tokens != state_->config.page_tokens) {
    throw RequestError(Code::kFailedPrecondition,
                       text("chunk: given pages of ", exported.spec.layout.page_tokens,
                            " tokens; allowed: ", state_->config.page_tokens));
  }
  growth = checked_growth(growth, exported.max_tokens, exported.length, {});
  const std::scoped_lock lock(state_->mutex);
  const TimePoint now = Clock::now();
  state_->expire(now);
  state_->check_count(1, owner, now);
  const KvPlanPtr plan = state_->plan_of(exported.spec);
  const bool cross = !plan->cross.empty();
  if (cross != (exported.cross_tokens > 0) || exported.cross_length > exported.cross_tokens ||
      (cross && exported.cross_length == 0 && exported.length > 0)) {
    refuse_chunk("the keys of cross layers are out of range");
  }
  const std::uint64_t most = cross ? 0 : exported.length / plan->page_tokens();
  if (prefix_hashes.size() > most) {
    throw RequestError(invalid_argument("session.prefix_hashes", text(prefix_hashes.size()),
                                        text("at most ", most, ", for full pages")));
  }
  for (const WindowGroup& group : plan->windows) {
    for (const std::uint32_t layer : group.layers) {
      const std::uint32_t first = exported.first_pages[layer];
      // As KvSession keeps them: all that a query sees is there, and no more than is promised.
      const bool enough = first <= group.kept_pages ||
                          plan->pages(exported.length) <= group.kept_pages ||
                          first <= plan->first_page(group, exported.length, 0);
      const bool few = std::max<std::uint64_t>(first, group.kept_pages) >=
                       plan->first_page(group, exported.length, kTruncatable);
      if (enough && few && first == exported.first_pages[group.layers.front()]) continue;
      refuse_chunk("the pages of a window are out of range");
    }
  }
  const KvSessionPtr session = state_->make(plan, owner);
  session->max_tokens = growth.max_tokens;
  session->reserved_tokens = growth.reserved_tokens;
  session->length = exported.length;
  session->cross_length = exported.cross_length;
  session->cross_tokens = exported.cross_tokens;
  try {
    state_->promise(*session, "session", owner, now);
    session->provide(exported.first_pages);
  } catch (...) {
    session->release();
    throw;
  }
  return KvImport(*this, session, lease, prefix_hashes);
}

KvImport::KvImport(KvSessions& store, std::shared_ptr<KvSession> session, Duration lease,
                   std::span<const PageHash> prefix_hashes)
    : store_(&store), session_(std::move(session)), lease_(lease), at_(*session_) {
  KvPrefixes::append(chain_, session_->root, prefix_hashes);
}

KvImport::KvImport(KvImport&&) noexcept = default;

KvImport::~KvImport() {
  if (!session_) return;
  const std::scoped_lock lock(store_->state_->mutex);
  session_->release();
}

void KvImport::add(ByteSpan bytes) {
  const Chunk chunk = read_chunk(bytes);
  if (chunk.index != index_ || ended_) {
    refuse_chunk(ended_ ? std::string("it comes after the last one")
                        : text("given index ", chunk.index, "; allowed: the next one, ", index_));
  }
  if (index_ == 0) nonce_ = chunk.nonce;
  if (chunk.nonce != nonce_) refuse_chunk("it is of another export than those before it");
  ByteSpan left = index_ == 0 ? ByteSpan() : chunk.payload;
  while (!left.empty()) {
    if (at_.ended()) refuse_chunk("there are more bytes than the session has");
    const std::size_t size = std::min(left.size(), at_.left_in_page());
    std::memcpy(session_->data(at_.page()) + at_.offset(), left.data(), size);
    left = left.subspan(size);
    at_.advance(size);
  }
  ++index_;
  ended_ = chunk.last;
}

SessionState KvImport::finish() {
  if (!ended_ || !at_.ended()) refuse_chunk("the last ones are missing");
  std::string id = KvSessions::new_id();
  const std::scoped_lock lock(store_->state_->mutex);
  const TimePoint now = Clock::now();
  store_->state_->expire(now);
  store_->state_->check_count(1, {session_->owner, session_->most_of_owner}, now);
  store_->state_->add(session_, std::move(id), lease_, now);
  session_->publish(chain_);
  session_->recharge();  // to less, or as much
  return KvState::state_of(*std::exchange(session_, nullptr));
}

}  // namespace attnserve::sessions
