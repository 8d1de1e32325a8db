// Runs of transformers over ragged token sequences, those of several requests as one.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "engine/attend.h"
#include "engine/model.h"

namespace attnserve::engine {

// Token ids, ragged: sequence i is ids[starts[i] .. starts[i + 1]).
struct TokenSequences {
  std::vector<std::int64_t> ids;
  std::vector<std::size_t> starts{0};
  std::size_t count() const { return starts.size() - 1; }
  std::int64_t longest() const;
};

// What a transformer reads that is no token ids: embeddings, pictures, sounds; a sequence a row.
struct TensorInput {
  std::string name;  // of the graph's input; empty: there is none
  // [B, ...]. A view: whoever makes the work keeps the elements until it has run.
  Tensor tensor;
  // Of rows [S, ...], elements that are no padding; empty where every row is whole. The graph is
  // told by its input `mask_name`.
  std::vector<std::int64_t> lengths;
  std::string mask_name;
  std::int64_t tokens = 0;  // that the longest row is read as
};

// One request's sequences through a transformer, and what came of it.
struct TokensWork {
  ModelPtr model;
  const Variant* variant = nullptr;
  TokenSequences source;                   // empty if `given` is read in its place
  std::vector<std::int64_t> source_types;  // of each id of source; empty: all are 0
  TensorInput given;                       // as many rows as there are sequences, if it is there
  TokenSequences target;                   // empty unless the model is an encoder-decoder
  std::vector<std::string> outputs;        // of the graph, wanted
  // Filled by the run: for each output its rows of these sequences (graph outputs whose first axis
  // is not the batch are whole), still padded to the batch's longest: padded_source, padded_target.
  std::vector<OwnedTensor> results;
  std::int64_t padded_source = 0, padded_target = 0;

  std::size_t count() const;            // sequences
  std::int64_t longest_source() const;  // in tokens
};

BatchKey batch_key(const TokensWork& work);
std::size_t hidden_bytes(const TokensWork& work);
void attend_tokens_together(std::span<TokensWork* const> works, Stop* stop);

}  // namespace attnserve::engine
