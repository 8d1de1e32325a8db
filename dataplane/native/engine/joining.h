// Several attentions as one: joined along the batch axis, run once, taken apart again. Private to
// engine/.
//
// Works of unlike lengths are padded to the longest. Padded keys are masked by key_lengths; padded
// queries are computed and dropped. The operator of attnserve-kernels computes each query by
// itself, block by block of keys from the first, so that its results are the same to the bit
// whatever a work was joined with; ONNX Runtime's own kernels may choose another order of summation
// for another size, and then agree within the tolerances of docs/kernels.md.
#pragma once

#include <span>
#include <vector>

#include "engine/attend.h"

namespace attnserve::engine {

// The one work that several works of one key make, with memory of its own.
class JoinedWork {
 public:
  explicit JoinedWork(std::span<AttendWork* const> works);
  JoinedWork(const JoinedWork&) = delete;
  JoinedWork& operator=(const JoinedWork&) = delete;

  const AttendWork& work() const { return joint_; }
  // After the run: puts each work's part of the results, without padding, where it wants it.
  void share() const;

 private:
  std::span<AttendWork* const> works_;
  AttendWork joint_;
  std::vector<Bytes> memory_;  // that joint_ views
};

}  // namespace attnserve::engine
