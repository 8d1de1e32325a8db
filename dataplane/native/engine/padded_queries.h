// Tokens of self-attention that are padding are no queries: what is said of the weights, entropy
// and sums, leaves their rows out, as those of queries that see no key, whatever they hold.
#pragma once

#include <cstdint>
#include <vector>

#include "base/memory.h"
#include "engine/attend.h"

namespace attnserve::engine {

// How many of each sequence's queries are tokens; empty: all of them, or nobody says so.
std::vector<std::int64_t> query_lengths(const AttendWork& work);

// The shape of such a mask: one entry for each sequence and query, else as `mask` has it.
Shape shape_without_padding(const Shape& mask, const Dims& dims);

// What a mask [B, H, Sq, Sk], each 1 or the whole, lets queries see that are no padding; into BOOL
// of `shape_without_padding`.
void hide_padding(const Tensor& mask, const std::vector<std::int64_t>& lengths, const Tensor& into);

}  // namespace attnserve::engine
