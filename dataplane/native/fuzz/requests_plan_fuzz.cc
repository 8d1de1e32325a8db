// Whatever a request says: it is refused in words, or what the engine would be fed is there, byte
// by byte. The first byte of the input says which protocol the rest came by.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/text.h"
#include "requests/infer.h"
#include "tests/requests_infer_support.h"
#include "wire/attention.h"
#include "wire/open_inference.h"

namespace {

using namespace attnserve;
using namespace attnserve::requests;

constexpr std::size_t kMostChunked = 1U << 20;  // larger ones are planned, but not prepared

struct Server {
  World world;
  SharedObject object{world};
  std::string handle = world.store(DataType::kFp32, {1, 4, 3, 8});
};

Server& server() {
  static Server one;
  return one;
}

void require(bool holds) {
  if (!holds) std::abort();
}

// Every graph has what it takes, and all of it can be read.
void check_feeds(const engine::AttendWork& work) {
  std::uint8_t seen = 0;
  for (const Tensor& tensor : work.feeds) {
    if (tensor.data == nullptr) continue;
    for (std::size_t i = 0; i < tensor.byte_size(); ++i) {
      seen ^= static_cast<std::uint8_t>(tensor.data[i]);
    }
  }
  volatile std::uint8_t kept = seen;
  static_cast<void>(kept);
  for (const engine::Variant* graph : {work.variant, work.diagnosis}) {
    if (graph == nullptr) continue;
    for (const engine::Port& port : graph->session->inputs()) {
      bool fed = false;
      for (std::size_t i = 0; i < engine::kFeeds; ++i) {
        fed |= name_of(static_cast<engine::Feed>(i)) == port.name && work.feeds[i].data != nullptr;
      }
      require(fed);
    }
  }
}

void check_sizes(const AttendPlan& plan, const Limits& limits) {
  std::size_t response = 0;
  for (const wire::ResultSpec& result : plan.results) {
    const Tensor tensor{result.dtype, result.shape, nullptr};
    require(tensor.byte_size() == result.byte_size);
    response += result.byte_size;
  }
  require(response == plan.response_bytes && response <= limits.max_response_bytes);
  require(plan.request_bytes <= limits.max_request_bytes);
  require(plan.sent_bytes <= plan.request_bytes);
  require(plan.working_bytes <= limits.max_working_bytes);
  require(offsets(plan.results).back() >= response);
}

void attend(ByteSpan message, bool chunks_allowed) {
  const Context context = server().world.context();
  wire::AttendRequest request = wire::decode_attend(message, "Attend");
  std::array<ByteSpan, wire::kInputs> elements;
  for (std::size_t i = 0; i < wire::kInputs; ++i) {
    auto& tensor = request.tensors[i];
    if (!tensor) continue;
    if (tensor->stored == "s") tensor->stored = server().handle;  // which nobody could guess
    elements[i] = tensor->data;
  }
  AttendPlan plan = plan_attend(request, context, kPeer, chunks_allowed);
  check_sizes(plan, context.limits);
  std::vector<Bytes> chunks;
  for (std::size_t i = 0; i < wire::kInputs; ++i) {
    if (!plan.specs[i] || !plan.specs[i]->chunked) continue;
    if (plan.specs[i]->byte_size > kMostChunked) return;
    chunks.push_back(Bytes::allocate(plan.specs[i]->byte_size));
    std::memset(chunks.back().data(), 0, chunks.back().size());
    elements[i] = chunks.back().span();
  }
  const auto prepared = prepare(std::move(plan), elements, context, kPeer);
  check_feeds(prepared->work);
  prepared->check_intact();
}

void infer(ByteSpan message) {
  const Context context = server().world.context();
  InferPlan plan = [&] {
    wire::InferRequest request = wire::decode_infer(message, "ModelInfer");
    return plan_infer(request, context.models.get(request.model_name, request.model_version),
                      context, kPeer);
  }();
  check_sizes(plan.attend, context.limits);
  for (const wire::InferResult& result : answer_outputs(plan, context.limits)) {
    require(Tensor{data_type_of(result.datatype), result.shape, nullptr}.byte_size() ==
            result.byte_size);
  }
  const auto prepared = prepare(std::move(plan.attend), plan.elements, context, kPeer);
  check_feeds(prepared->work);
  for (const sessions::RegionView& region : plan.regions) region.check_intact();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const ByteSpan message = std::as_bytes(std::span(data, size)).subspan(1);
  try {
    switch (data[0] % 3) {
      case 0:
        attend(message, false);
        break;
      case 1:
        attend(message, true);
        break;
      default:
        infer(message);
    }
  } catch (const RequestError& error) {
    require(error.status().code != Code::kOk && error.status().code != Code::kInternal);
    require(!error.status().message.empty());
  }
  return 0;
}
