// Whatever bytes come as a request of the Open Inference Protocol or of grpc.health.v1: they are
// decoded or refused, and typed contents are gathered within the memory that they are charged for.
#include <cstdint>
#include <cstdlib>

#include "wire/open_inference.h"

namespace {

using namespace attnserve;

template <class Decode>
void decode(Decode function) {
  try {
    function();
  } catch (const RequestError& error) {
    const Code code = error.status().code;
    if (code != Code::kInvalidArgument && code != Code::kResourceExhausted) std::abort();
  }
}

void check(const wire::InferRequest& request, const ByteBudget& budget) {
  std::size_t gathered = 0;
  for (const wire::InferInput& input : request.inputs) {
    if (!input.contents) continue;
    const wire::Contents& contents = *input.contents;
    if (contents.dtype == DataType::kUnspecified) continue;
    if (contents.elements.size() != contents.count * item_bytes(contents.dtype)) std::abort();
    gathered += contents.elements.size();
  }
  if (budget.lent() != gathered) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const ByteSpan message = std::as_bytes(std::span(data, size));
  ByteBudget budget(1 << 16);
  decode([&] { check(wire::decode_infer(message, "ModelInfer", &budget), budget); });
  if (budget.lent() != 0) std::abort();
  decode([&] { wire::decode_health_check(message); });
  return 0;
}
