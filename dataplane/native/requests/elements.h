// The elements of a request's tensors: checks of them, and what is done to them before the run.
#pragma once

#include <cstdint>

#include "base/memory.h"
#include "base/tensor.h"

namespace attnserve::requests {

// Each of [B] lies in 0..key_len. Throws RequestError INVALID_ARGUMENT with the first that does
// not.
void check_key_lengths(const Tensor& key_lengths, std::int64_t key_len);

// Neither NaN nor +infinity among FP32, FP16 or BF16. Throws RequestError INVALID_ARGUMENT with the
// first NaN or, if there is none, the first infinity.
void check_bias(const Tensor& bias);

// Multiplies elements of FP32, FP16 or BF16, which may lie anywhere, by a factor: in FP32, rounded
// back to nearest. `to` is as long as `from`, and aligned.
void scale_elements(DataType dtype, ByteSpan from, float factor, MutableByteSpan to);

}  // namespace attnserve::requests
