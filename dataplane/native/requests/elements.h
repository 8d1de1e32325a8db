// The elements of a request's tensors: checks of them, and what is done to them before the run.
#pragma once

#include <cstdint>
#include <string_view>

#include "base/memory.h"
#include "base/tensor.h"

namespace attnserve::requests {

// Each of [B], which `field` names, lies in 0..key_len. Throws RequestError INVALID_ARGUMENT with
// the first that does not.
void check_lengths(std::string_view field, const Tensor& lengths, std::int64_t key_len);

// [N + 1] numbers rise, or stay, from 0 to `end`. Throws RequestError INVALID_ARGUMENT with the
// first that is wrong.
void check_starts(std::string_view field, const Tensor& starts, std::int64_t end);

// Each element of BOOL is 0 or 1. Throws RequestError INVALID_ARGUMENT with the first that is not.
void check_mask(std::string_view field, const Tensor& mask);

// A bias that says what a mask says, 0 or -infinity: `to` has as many elements, of `dtype`.
void bias_of_mask(const Tensor& mask, DataType dtype, std::byte* to);

// Neither NaN nor +infinity among FP32, FP16 or BF16. Throws RequestError INVALID_ARGUMENT with the
// first NaN or, if there is none, the first infinity. What is added to scores, or is one, may hide.
void check_added(std::string_view field, const Tensor& added);

// Multiplies elements of FP32, FP16 or BF16, which may lie anywhere, by a factor: in FP32, rounded
// back to nearest. `to` is as long as `from`, and aligned.
void scale_elements(DataType dtype, ByteSpan from, float factor, MutableByteSpan to);

}  // namespace attnserve::requests
