#include "engine/run.h"

#include <algorithm>
#include <stdexcept>

#include "engine/diagnostics.h"
#include "engine/padded_queries.h"

namespace attnserve::engine {
namespace {

constexpr std::size_t index_of(Result result) { return static_cast<std::size_t>(result); }
constexpr std::size_t index_of(Feed feed) { return static_cast<std::size_t>(feed); }

// What is given to a run and what is fetched from it, without memory of its own.
class Call {
 public:
  explicit Call(const AttendWork& work) : work_(work) {
    for (std::size_t i = 0; i < kFeeds; ++i) {
      if (work.feeds[i].data != nullptr) {
        feeds_[feed_count_++] = {name_of(static_cast<Feed>(i)), work.feeds[i]};
      }
    }
  }

  // Give another tensor than the work's in the place of one that it has.
  void feed(Feed which, const Tensor& tensor) {
    for (std::size_t i = 0; i < feed_count_; ++i) {
      if (feeds_[i].name == name_of(which)) feeds_[i].tensor = tensor;
    }
  }

  void fetch(Result result) { fetch(result, work_.results[index_of(result)]); }
  void fetch(Result result, const Tensor& into) {
    if (into.data == nullptr) throw std::logic_error("a result is wanted, but there is no place");
    fetches_[fetch_count_].name = name_of(result);
    fetches_[fetch_count_++].into = into;
  }

  void run(const Variant& variant, Stop* stop) {
    if (fetch_count_ == 0) return;
    variant.session->run({feeds_.data(), feed_count_}, {fetches_.data(), fetch_count_}, stop);
    fetch_count_ = 0;
  }

 private:
  const AttendWork& work_;
  std::array<Session::Feed, kFeeds> feeds_;
  std::array<Session::Fetch, kResults> fetches_;
  std::size_t feed_count_ = 0, fetch_count_ = 0;
};

// The results that say something of the weights.
template <class Each>
void for_each_said(const Wanted& wanted, Each each) {
  if (wanted.entropy) each(Result::kEntropy);
  if (wanted.top_k > 0) {
    each(Result::kTopKIndices);
    each(Result::kTopKWeights);
  }
  if (wanted.mass_per_key) each(Result::kMassPerKey);
  if (wanted.mass_by_distance > 0) each(Result::kMassByDistance);
}

DataType weights_dtype(const Session& session) {
  const auto& ports = session.outputs();
  const auto port = std::ranges::find(ports, name_of(Result::kWeights), &Port::name);
  if (port == ports.end()) throw std::logic_error("the graph gives no weights");
  return port->dtype;
}

}  // namespace

void attend(const AttendWork& work, Stop* stop) {
  const Wanted& wanted = work.wanted;
  const bool from_weights = wanted.diagnosed() && work.diagnosis == nullptr;
  Call call(work);
  if (wanted.output) call.fetch(Result::kOutput);
  if (wanted.log_sum_exp) call.fetch(Result::kLogSumExp);

  Tensor weights = work.results[index_of(Result::kWeights)];
  Bytes unwanted;  // weights that only what they say is wanted of
  if (from_weights && !wanted.weights) {
    const Dims& dims = work.dims;
    weights.dtype = weights_dtype(*work.variant->session);
    weights.shape = {dims.batch, dims.num_heads, dims.query_len, dims.key_len};
    unwanted = Bytes::allocate(weights.byte_size());
    weights.data = unwanted.data();
  }
  if (wanted.weights || from_weights) call.fetch(Result::kWeights, weights);
  call.run(*work.variant, stop);

  if (!wanted.diagnosed()) return;
  const std::vector<std::int64_t> lengths = query_lengths(work);
  if (from_weights) {
    diagnose_weights(weights, wanted, work.feeds[index_of(Feed::kKeyLengths)], lengths,
                     work.model->facts.bottom_right, work.results, stop);
    return;
  }
  const Tensor& mask = work.feeds[index_of(Feed::kMask)];
  Bytes hidden;
  if (!lengths.empty() && mask.data != nullptr) {
    Tensor without{DataType::kBool, shape_without_padding(mask.shape, work.dims), nullptr};
    hidden = Bytes::allocate(without.byte_size());
    without.data = hidden.data();
    hide_padding(mask, lengths, without);
    call.feed(Feed::kMask, without);
  }
  for_each_said(wanted, [&](Result result) { call.fetch(result); });
  call.run(*work.diagnosis, stop);
}

}  // namespace attnserve::engine
