#include "sessions/kv_transfer.h"

#include <openssl/sha.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>

#include "base/random.h"
#include "base/status.h"
#include "base/text.h"
#include "sessions/kv_state.h"

namespace attnserve::sessions {

namespace {

constexpr std::string_view kMagic{"attnkv\0\0", 8};
constexpr std::uint32_t kVersion = 1;
constexpr std::size_t kHeaderBytes = 64;
constexpr std::size_t kNonceBytes = 16;
constexpr std::size_t kCheckedBytes = 48;  // of the header, before the checksum
constexpr std::size_t kMostName = 4096;
constexpr std::size_t kMostSize = 1 << 20;  // of a dimension

static_assert(std::endian::native == std::endian::little, "chunks are little-endian");

[[noreturn]] void refuse_data(std::string_view what) {
  throw RequestError(Code::kDataLoss, text("chunk: ", what));
}

class Writer {
 public:
  template <class T>
  void number(T value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void name(const std::string& value) {
    number(static_cast<std::uint32_t>(value.size()));
    bytes_ += value;
  }
  ByteSpan bytes() const { return std::as_bytes(std::span(bytes_)); }

 private:
  std::string bytes_;
};

class Reader {
 public:
  explicit Reader(ByteSpan bytes) : left_(bytes) {}
  template <class T>
  T number() {
    T value{};
    std::memcpy(&value, take(sizeof value).data(), sizeof value);
    return value;
  }
  std::string name() {
    const auto size = number<std::uint32_t>();
    if (size > kMostName) refuse_data("a name is too long");
    const ByteSpan bytes = take(size);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }
  bool at_end() const { return left_.empty(); }

 private:
  ByteSpan take(std::size_t size) {
    if (size > left_.size()) refuse_data("it ends too early");
    const ByteSpan taken = left_.first(size);
    left_ = left_.subspan(size);
    return taken;
  }
  ByteSpan left_;
};

// In this order: model, version; num_kv_heads, head_dim, value_head_dim, page_tokens as u64; the
// cache type as u32; the number of layers as u32, and of each window and kept_first as i64, cross
// as u32 and the first page as u32; length, max_tokens, reserved_tokens, cross_length and
// cross_tokens as u64. A name is its bytes after their number as u32.
void write_description(Writer& to, const ExportedSession& session) {
  to.name(session.spec.model);
  to.name(session.spec.version);
  const PageLayout& layout = session.spec.layout;
  for (const std::size_t size :
       {layout.num_kv_heads, layout.head_dim, layout.value_head_dim, layout.page_tokens}) {
    to.number(std::uint64_t{size});
  }
  to.number(static_cast<std::uint32_t>(layout.type));
  to.number(static_cast<std::uint32_t>(session.spec.layers.size()));
  for (std::size_t layer = 0; layer < session.spec.layers.size(); ++layer) {
    to.number(session.spec.layers[layer].window);
    to.number(session.spec.layers[layer].kept_first);
    to.number(std::uint32_t{session.spec.layers[layer].cross});
    to.number(session.first_pages[layer]);
  }
  for (const std::uint64_t count : {session.length, session.max_tokens, session.reserved_tokens,
                                    session.cross_length, session.cross_tokens}) {
    to.number(count);
  }
}

ExportedSession read_description(ByteSpan payload) {
  Reader from(payload);
  ExportedSession session;
  session.spec.model = from.name();
  session.spec.version = from.name();
  PageLayout& layout = session.spec.layout;
  for (std::size_t* size :
       {&layout.num_kv_heads, &layout.head_dim, &layout.value_head_dim, &layout.page_tokens}) {
    *size = from.number<std::uint64_t>();
    if (*size == 0 || *size > kMostSize) refuse_data("a dimension is out of range");
  }
  const auto type = from.number<std::uint32_t>();
  if (type > static_cast<std::uint32_t>(CacheType::kFp8)) refuse_data("no such cache type");
  layout.type = static_cast<CacheType>(type);
  const auto layers = from.number<std::uint32_t>();
  if (layers == 0 || layers > kMostLayers) refuse_data("the number of layers is out of range");
  for (std::uint32_t layer = 0; layer < layers; ++layer) {
    LayerSpec spec;
    spec.window = from.number<std::int64_t>();
    spec.kept_first = from.number<std::int64_t>();
    spec.cross = from.number<std::uint32_t>() != 0;
    session.spec.layers.push_back(spec);
    session.first_pages.push_back(from.number<std::uint32_t>());
  }
  for (std::uint64_t* count : {&session.length, &session.max_tokens, &session.reserved_tokens,
                               &session.cross_length, &session.cross_tokens}) {
    *count = from.number<std::uint64_t>();
    if (*count > kMostTokens) refuse_data("a number of tokens is out of range");
  }
  if (!from.at_end()) refuse_data("it is too long");
  return session;
}

using Checksum = std::array<unsigned char, SHA256_DIGEST_LENGTH>;

// Of the header's first bytes and the payload, which lie in one chunk with the checksum between
// them.
Checksum checksum_of(ByteSpan chunk) {
  Checksum of_payload, sum;
  SHA256(reinterpret_cast<const unsigned char*>(chunk.data() + kHeaderBytes),
         chunk.size() - kHeaderBytes, of_payload.data());
  std::array<unsigned char, kCheckedBytes + SHA256_DIGEST_LENGTH> both;
  std::memcpy(both.data(), chunk.data(), kCheckedBytes);
  std::ranges::copy(of_payload, both.begin() + kCheckedBytes);
  SHA256(both.data(), both.size(), sum.data());
  return sum;
}

struct Chunk {
  std::uint32_t index = 0;
  bool last = false;
  std::array<std::byte, kNonceBytes> nonce{};
  ByteSpan payload;
};

Chunk read_chunk(ByteSpan bytes) {
  if (bytes.size() < kHeaderBytes) refuse_data("it is shorter than its header");
  if (std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) {
    refuse_data("it is none of an exported session");
  }
  Reader from(bytes.first(kHeaderBytes).subspan(kMagic.size()));
  const auto version = from.number<std::uint32_t>();
  if (version != kVersion) {
    throw RequestError(Code::kFailedPrecondition, text("chunk: given version ", version,
                                                       " of the format; allowed: ", kVersion));
  }
  Chunk chunk;
  chunk.index = from.number<std::uint32_t>();
  chunk.last = from.number<std::uint32_t>() != 0;
  from.number<std::uint32_t>();
  const auto size = from.number<std::uint64_t>();
  if (size != bytes.size() - kHeaderBytes) refuse_data("its size is not what it says");
  chunk.nonce = from.number<std::array<std::byte, kNonceBytes>>();
  chunk.payload = bytes.subspan(kHeaderBytes);
  const Checksum sum = checksum_of(bytes);
  if (std::memcmp(sum.data(), bytes.data() + kCheckedBytes, kHeaderBytes - kCheckedBytes) != 0) {
    refuse_data("its checksum does not match: it was changed");
  }
  return chunk;
}

// Fills in the header of a chunk whose payload is there.
void seal(Bytes& chunk, std::uint32_t index, bool last, ByteSpan nonce) {
  Writer header;
  header.number(kVersion);
  header.number(index);
  header.number(std::uint32_t{last});
  header.number(std::uint32_t{0});
  header.number(std::uint64_t{chunk.size() - kHeaderBytes});
  std::byte* to = chunk.data();
  to = std::ranges::copy(std::as_bytes(std::span(kMagic)), to).out;
  to = std::ranges::copy(header.bytes(), to).out;
  to = std::ranges::copy(nonce, to).out;
  const Checksum sum = checksum_of(chunk.span());
  std::memcpy(to, sum.data(), kHeaderBytes - kCheckedBytes);
}

// Of a page's bytes, those from `from` on; rows of tokens that are not there are zero.
void copy_page(const PageLayout& layout, const std::byte* page, std::size_t tokens,
               std::size_t from, MutableByteSpan to) {
  if (tokens >= layout.page_tokens && from + to.size() <= layout.value_scale_at(layout.rows())) {
    std::memcpy(to.data(), page + from, to.size());
    return;
  }
  std::vector<std::byte> whole(layout.page_bytes());
  const auto copy = [&](std::size_t at, std::size_t row_bytes) {
    std::memcpy(whole.data() + at, page + at, std::min(tokens, layout.page_tokens) * row_bytes);
  };
  for (std::size_t head = 0; head < layout.num_kv_heads; ++head) {
    const std::size_t row = layout.row_of(head, 0);
    copy(layout.key_at(row), layout.key_row_bytes());
    copy(layout.value_at(row), layout.value_row_bytes());
    copy(layout.key_scale_at(row), layout.scale_bytes());
    copy(layout.value_scale_at(row), layout.scale_bytes());
  }
  std::memcpy(to.data(), whole.data() + from, to.size());
}

}  // namespace

PageCursor::PageCursor(const KvSession& session) : session_(&session) { skip(); }

void PageCursor::skip() {
  const std::size_t layers = session_->plan().spec.layers.size();
  for (; layer_ < layers; ++layer_, page_ = 0) {
    const KvSession::Table& table = session_->table(layer_);
    while (page_ < table.size() && table[page_] == kGivenBack) ++page_;
    if (page_ < table.size()) return;
  }
  layer_ = kEnd;
}

std::size_t PageCursor::left_in_page() const {
  return session_->plan().spec.layout.page_bytes() - offset_;
}

std::int64_t PageCursor::page() const { return session_->table(layer_)[page_]; }

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

ExportedSession read_exported(ByteSpan bytes) {
  const Chunk chunk = read_chunk(bytes);
  if (chunk.index != 0) refuse_data(text("the first one has index ", chunk.index));
  return read_description(chunk.payload);
}

KvExport KvSessions::export_session(std::string_view id, std::string_view owner) {
  const std::scoped_lock lock(state_->mutex);
  const TimePoint now = Clock::now();
  state_->expire(now);
  const KvSessionPtr session = state_->find_idle(id, owner, now);
  const KvSessionPtr snapshot = state_->make(session->plan_ptr(), owner);
  snapshot->max_tokens = session->max_tokens;
  snapshot->frozen = true;
  try {
    snapshot->adopt(*session, session->length);
    state_->promise(*snapshot, "session_id", now);
  } catch (...) {
    snapshot->release();
    throw;
  }
  return KvExport(*this, snapshot, session->reserved_tokens);
}

KvExport::KvExport(KvSessions& store, std::shared_ptr<KvSession> snapshot, std::uint64_t reserved)
    : store_(&store), snapshot_(std::move(snapshot)), reserved_(reserved), at_(*snapshot_) {
  const std::string random = random_hex(kNonceBytes / 2);
  std::memcpy(nonce_.data(), random.data(), kNonceBytes);
}

KvExport::KvExport(KvExport&&) noexcept = default;

KvExport::~KvExport() {
  if (!snapshot_) return;
  const std::scoped_lock lock(store_->state_->mutex);
  snapshot_->release();
}

Bytes KvExport::next(std::size_t most) {
  if (ended_) return {};
  Bytes chunk = index_ == 0 ? describe() : read_pages(most);
  ended_ = at_.ended();
  seal(chunk, index_++, ended_, nonce_);
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
  Writer description;
  write_description(description, session);
  Bytes chunk = Bytes::allocate(kHeaderBytes + description.bytes().size());
  std::ranges::copy(description.bytes(), chunk.data() + kHeaderBytes);
  return chunk;
}

Bytes KvExport::read_pages(std::size_t most) {
  const PageLayout& layout = snapshot_->plan().spec.layout;
  Bytes chunk = Bytes::allocate(std::max(most, kHeaderBytes + 1));
  std::size_t filled = kHeaderBytes;
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
                                    std::string_view owner) {
  if (exported.spec.layout.page_tokens != state_->config.page_tokens) {
    throw RequestError(Code::kFailedPrecondition,
                       text("chunk: given pages of ", exported.spec.layout.page_tokens,
                            " tokens; allowed: ", state_->config.page_tokens));
  }
  growth = checked_growth(growth, exported.max_tokens, exported.length, {});
  const std::scoped_lock lock(state_->mutex);
  const TimePoint now = Clock::now();
  state_->expire(now);
  state_->check_count(1, now);
  const KvPlanPtr plan = state_->plan_of(exported.spec);
  const bool cross = !plan->cross.empty();
  if (cross != (exported.cross_tokens > 0) || exported.cross_length > exported.cross_tokens ||
      (cross && exported.cross_length == 0 && exported.length > 0)) {
    refuse_data("the keys of cross layers are out of range");
  }
  for (const WindowGroup& group : plan->windows) {
    for (const std::uint32_t layer : group.layers) {
      const std::uint32_t first = exported.first_pages[layer];
      const bool all_kept = plan->pages(exported.length) <= group.kept_pages;
      const bool enough = first <= plan->first_page(group, exported.length, 0) || all_kept;
      if (first == exported.first_pages[group.layers.front()] && enough &&
          first >= plan->first_page(group, exported.length, kTruncatable)) {
        continue;
      }
      refuse_data("the pages of a window are out of range");
    }
  }
  const KvSessionPtr session = state_->make(plan, owner);
  session->max_tokens = growth.max_tokens;
  session->reserved_tokens = growth.reserved_tokens;
  session->length = exported.length;
  session->cross_length = exported.cross_length;
  session->cross_tokens = exported.cross_tokens;
  try {
    state_->promise(*session, "session", now);
    session->provide(exported.first_pages);
  } catch (...) {
    session->release();
    throw;
  }
  return KvImport(*this, session, lease);
}

KvImport::KvImport(KvSessions& store, std::shared_ptr<KvSession> session, Duration lease)
    : store_(&store), session_(std::move(session)), lease_(lease), at_(*session_) {}

KvImport::KvImport(KvImport&&) noexcept = default;

KvImport::~KvImport() {
  if (!session_) return;
  const std::scoped_lock lock(store_->state_->mutex);
  session_->release();
}

void KvImport::add(ByteSpan bytes) {
  const Chunk chunk = read_chunk(bytes);
  if (chunk.index != index_ || ended_) {
    refuse_data(ended_ ? std::string("it comes after the last one")
                       : text("given index ", chunk.index, "; allowed: the next one, ", index_));
  }
  if (index_ == 0) nonce_ = chunk.nonce;
  if (chunk.nonce != nonce_) refuse_data("it is of another export than those before it");
  ByteSpan left = index_ == 0 ? ByteSpan() : chunk.payload;
  while (!left.empty()) {
    if (at_.ended()) refuse_data("there are more bytes than the session has");
    const std::size_t size = std::min(left.size(), at_.left_in_page());
    std::memcpy(session_->data(at_.page()) + at_.offset(), left.data(), size);
    left = left.subspan(size);
    at_.advance(size);
  }
  ++index_;
  ended_ = chunk.last;
}

SessionState KvImport::finish() {
  if (!ended_ || !at_.ended()) refuse_data("the last ones are missing");
  std::string id = KvSessions::new_id();
  const std::scoped_lock lock(store_->state_->mutex);
  const TimePoint now = Clock::now();
  store_->state_->expire(now);
  store_->state_->check_count(1, now);
  store_->state_->add(session_, std::move(id), lease_, now);
  return KvState::state_of(*std::exchange(session_, nullptr));
}

}  // namespace attnserve::sessions
