// What attention weights say: how spread, on which keys, how much each key gets, how far away. From
// the weights themselves, where a graph gives them; a model's `diagnostics` variant says the same
// without ever holding them all. Private to engine/.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "base/tensor.h"
#include "engine/attend.h"

namespace attnserve::engine {

// Computes what is wanted of weights [B, H, Sq, Sk], FP32, FP16 or BF16, whose rows sum to 1, to
// less where a sink takes the rest, or to 0 where a query sees no key. Into `results`, which may be
// unaligned:
//   entropy [B, H, Sq] FP32, nats; 0 for a query that sees one key or none, ln(n) for n seen alike;
//   top_k_indices [B, H, Sq, k] INT64 and top_k_weights FP32, heaviest first, of equal weights the
//     earlier key first;
//   mass_per_key [B, H, Sk] FP32, summed over queries;
//   mass_by_distance [B, H, N] FP32, by |position - key|; the last one gathers all from N - 1 on.
// `key_lengths` [B] INT64, looked at if `bottom_right`: query i is at key_length - Sq + i instead
// of i. `query_lengths`: of each sequence, from which query on rows are taken for 0; empty: none.
// Throws RequestError kCancelled when stopped.
void diagnose_weights(const Tensor& weights, const Wanted& wanted, const Tensor& key_lengths,
                      const std::vector<std::int64_t>& query_lengths, bool bottom_right,
                      const std::array<Tensor, kResults>& results, Stop* stop);

}  // namespace attnserve::engine
