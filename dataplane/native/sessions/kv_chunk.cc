#include "sessions/kv_chunk.h"

#include <openssl/sha.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "base/status.h"
#include "base/text.h"
#include "sessions/kv_sessions.h"

namespace attnserve::sessions {

namespace {

constexpr std::string_view kMagic{"attnkv\0\0", 8};
constexpr std::uint32_t kVersion = 3;
constexpr std::size_t kCheckedBytes = 48;  // of the header, before the checksum
constexpr std::size_t kMostName = 4096;
constexpr std::size_t kMostSize = 1 << 20;  // of a dimension

static_assert(std::endian::native == std::endian::little, "chunks are little-endian");

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
    if (size > kMostName) refuse_chunk("a name is too long");
    const ByteSpan bytes = take(size);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }
  bool at_end() const { return left_.empty(); }

 private:
  ByteSpan take(std::size_t size) {
    if (size > left_.size()) refuse_chunk("it ends too early");
    const ByteSpan taken = left_.first(size);
    left_ = left_.subspan(size);
    return taken;
  }
  ByteSpan left_;
};

// In this order: model, version; the number of layer models as u32, of each model and version;
// num_kv_heads, head_dim, value_head_dim, page_tokens as u64; the cache type, and 1 if it is
// latent, as u32; the number of layers as u32, and of each window and kept_first as i64, cross as
// u32, the number of sinks as u32 and each as f32, and the first page as u32; length, max_tokens,
// reserved_tokens, cross_length and cross_tokens as u64. A name is its bytes after their number as
// u32.
void write_description(Writer& to, const ExportedSession& session) {
  to.name(session.spec.model);
  to.name(session.spec.version);
  to.number(static_cast<std::uint32_t>(session.spec.layer_models.size()));
  for (const ModelName& each : session.spec.layer_models) {
    to.name(each.model);
    to.name(each.version);
  }
  const PageLayout& layout = session.spec.layout;
  for (const std::size_t size :
       {layout.num_kv_heads, layout.head_dim, layout.value_head_dim, layout.page_tokens}) {
    to.number(std::uint64_t{size});
  }
  to.number(static_cast<std::uint32_t>(layout.type));
  to.number(std::uint32_t{layout.latent});
  to.number(static_cast<std::uint32_t>(session.spec.layers.size()));
  for (std::size_t layer = 0; layer < session.spec.layers.size(); ++layer) {
    to.number(session.spec.layers[layer].window);
    to.number(session.spec.layers[layer].kept_first);
    to.number(std::uint32_t{session.spec.layers[layer].cross});
    to.number(static_cast<std::uint32_t>(session.spec.layers[layer].sinks.size()));
    for (const float sink : session.spec.layers[layer].sinks) to.number(sink);
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
  const auto models = from.number<std::uint32_t>();
  if (models > kMostLayers) refuse_chunk("the number of layer models is out of range");
  for (std::uint32_t layer = 0; layer < models; ++layer) {
    ModelName each;
    each.model = from.name();
    each.version = from.name();
    session.spec.layer_models.push_back(std::move(each));
  }
  PageLayout& layout = session.spec.layout;
  for (std::size_t* size :
       {&layout.num_kv_heads, &layout.head_dim, &layout.value_head_dim, &layout.page_tokens}) {
    *size = from.number<std::uint64_t>();
    if (*size == 0 || *size > kMostSize) refuse_chunk("a dimension is out of range");
  }
  const auto type = from.number<std::uint32_t>();
  if (type > static_cast<std::uint32_t>(CacheType::kFp8)) refuse_chunk("no such cache type");
  layout.type = static_cast<CacheType>(type);
  const auto latent = from.number<std::uint32_t>();
  if (latent > 1) refuse_chunk("latent is out of range");
  layout.latent = latent == 1;
  const auto layers = from.number<std::uint32_t>();
  if (layers == 0 || layers > kMostLayers) refuse_chunk("the number of layers is out of range");
  if (models != 0 && models != layers) refuse_chunk("not every layer has a model");
  for (std::uint32_t layer = 0; layer < layers; ++layer) {
    LayerSpec spec;
    spec.window = from.number<std::int64_t>();
    spec.kept_first = from.number<std::int64_t>();
    spec.cross = from.number<std::uint32_t>() != 0;
    const auto most = static_cast<std::int64_t>(kMostTokens);
    if (spec.window < -1 || spec.window > most || spec.kept_first < 0 || spec.kept_first > most ||
        (spec.window < 0 && spec.kept_first > 0) || (spec.cross && spec.window >= 0)) {
      refuse_chunk(text("what layer ", layer, " sees is out of range"));
    }
    const auto sinks = from.number<std::uint32_t>();
    if (sinks > kMostSize) refuse_chunk(text("the sinks of layer ", layer, " are out of range"));
    for (std::uint32_t head = 0; head < sinks; ++head) {
      spec.sinks.push_back(from.number<float>());
      if (!(spec.sinks.back() < std::numeric_limits<float>::infinity())) {
        refuse_chunk(text("the sinks of layer ", layer, " are out of range"));
      }
    }
    session.spec.layers.push_back(std::move(spec));
    session.first_pages.push_back(from.number<std::uint32_t>());
  }
  for (std::uint64_t* count : {&session.length, &session.max_tokens, &session.reserved_tokens,
                               &session.cross_length, &session.cross_tokens}) {
    *count = from.number<std::uint64_t>();
    if (*count > kMostTokens) refuse_chunk("a number of tokens is out of range");
  }
  if (!from.at_end()) refuse_chunk("it is too long");
  return session;
}

using Checksum = std::array<unsigned char, SHA256_DIGEST_LENGTH>;

// Of the header's first bytes and the payload, which lie in one chunk with the checksum between
// them.
Checksum checksum_of(ByteSpan chunk) {
  Checksum of_payload, sum;
  SHA256(reinterpret_cast<const unsigned char*>(chunk.data() + kChunkHeaderBytes),
         chunk.size() - kChunkHeaderBytes, of_payload.data());
  std::array<unsigned char, kCheckedBytes + SHA256_DIGEST_LENGTH> both;
  std::memcpy(both.data(), chunk.data(), kCheckedBytes);
  std::ranges::copy(of_payload, both.begin() + kCheckedBytes);
  SHA256(both.data(), both.size(), sum.data());
  return sum;
}

}  // namespace

void refuse_chunk(std::string_view what) {
  throw RequestError(Code::kDataLoss, text("chunk: ", what));
}

Chunk read_chunk(ByteSpan bytes) {
  if (bytes.size() < kChunkHeaderBytes) refuse_chunk("it is shorter than its header");
  if (std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) {
    refuse_chunk("it is none of an exported session");
  }
  Reader from(bytes.first(kChunkHeaderBytes).subspan(kMagic.size()));
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
  if (size != bytes.size() - kChunkHeaderBytes) refuse_chunk("its size is not what it says");
  chunk.nonce = from.number<std::array<std::byte, kChunkNonceBytes>>();
  chunk.payload = bytes.subspan(kChunkHeaderBytes);
  const Checksum sum = checksum_of(bytes);
  if (std::memcmp(sum.data(), bytes.data() + kCheckedBytes, kChunkHeaderBytes - kCheckedBytes) !=
      0) {
    refuse_chunk("its checksum does not match: it was changed");
  }
  return chunk;
}

void seal_chunk(Bytes& chunk, std::uint32_t index, bool last, ByteSpan nonce) {
  Writer header;
  header.number(kVersion);
  header.number(index);
  header.number(std::uint32_t{last});
  header.number(std::uint32_t{0});
  header.number(std::uint64_t{chunk.size() - kChunkHeaderBytes});
  std::byte* to = chunk.data();
  to = std::ranges::copy(std::as_bytes(std::span(kMagic)), to).out;
  to = std::ranges::copy(header.bytes(), to).out;
  to = std::ranges::copy(nonce, to).out;
  const Checksum sum = checksum_of(chunk.span());
  std::memcpy(to, sum.data(), kChunkHeaderBytes - kCheckedBytes);
}

Bytes description_chunk(const ExportedSession& session) {
  Writer description;
  write_description(description, session);
  Bytes chunk = Bytes::allocate(kChunkHeaderBytes + description.bytes().size());
  std::ranges::copy(description.bytes(), chunk.data() + kChunkHeaderBytes);
  return chunk;
}

ExportedSession read_exported(ByteSpan bytes) {
  const Chunk chunk = read_chunk(bytes);
  if (chunk.index != 0) refuse_chunk(text("the first one has index ", chunk.index));
  return read_description(chunk.payload);
}

}  // namespace attnserve::sessions
