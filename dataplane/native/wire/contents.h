// The elements of InferTensorContents, gathered from as many fields as they come in.
#pragma once

#include <array>
#include <vector>

#include "wire/fields.h"
#include "wire/open_inference.h"

namespace attnserve::wire {

constexpr std::size_t kContentsFields = 8;  // numbered from 1 on

// In two passes: the first checks and counts, the second writes into memory of just that size.
class ContentsReader {
 public:
  // One InferTensorContents of a tensor; further ones are merged with it. Views into the message.
  void add(ByteSpan body, FieldReader reader);
  Contents gather(ByteBudget* budget) const;

  // None of its own fields counts against DecodeLimits: they are but elements.
  static constexpr std::uint32_t kUncounted = numbers({1, 2, 3, 4, 5, 6, 7, 8});

 private:
  std::vector<ByteSpan> bodies_;
  std::array<std::size_t, kContentsFields> counts_{};  // by number - 1
};

}  // namespace attnserve::wire
