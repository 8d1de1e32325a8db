// Which implementation this processor runs.
#include "attention.h"
#include "paged.h"

#include <cstdlib>
#include <cstring>

namespace attnserve {
namespace {

struct Implementation {
  const char* name;
  Kernel attend;
  Kernel diagnose;
  PagedKernel store_pages;
  PagedKernel attend_pages;
  PagedKernel weigh_pages;
};

Implementation choose() {
  const Implementation generic_one = {"generic", generic::attend, generic::diagnose, generic::store_pages,
                                        generic::attend_pages, generic::weigh_pages};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const Implementation avx512_one = {"avx512", avx512::attend, avx512::diagnose, avx512::store_pages,
                                        avx512::attend_pages, avx512::weigh_pages};
  const Implementation avx2_one = {"avx2", avx2::attend, avx2::diagnose, avx2::store_pages,
                                        avx2::attend_pages, avx2::weigh_pages};
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 =
      has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // To test one implementation on a processor that would run another.
  const char* wanted = std::getenv("ATTNSERVE_KERNELS_ISA");
  if (wanted != nullptr && std::strcmp(wanted, "generic") == 0) return generic_one;
  if (wanted != nullptr && std::strcmp(wanted, "avx2") == 0 && has_avx2) return avx2_one;
  if (has_avx512) return avx512_one;
  if (has_avx2) return avx2_one;
#endif
  return generic_one;
}

const Implementation& implementation() {
  static const Implementation chosen = choose();
  return chosen;
}

}  // namespace

namespace {

// Pieces of so many queries that share a key head.
std::int64_t pieces(const Problem& problem, std::int64_t queries) {
  const std::int64_t rows = queries * (problem.num_heads / problem.num_kv_heads);
  return (rows + kQueriesPerTask - 1) / kQueriesPerTask;
}

}  // namespace

std::int64_t attention_tasks(const Problem& problem) {
  if (problem.packed > 0) return problem.num_kv_heads * problem.task_starts[problem.packed];
  return problem.batch * problem.num_kv_heads * pieces(problem, problem.query_len);
}

std::vector<std::int64_t> packed_tasks(const Problem& problem) {
  std::vector<std::int64_t> starts{0};
  for (std::int64_t s = 0; s < problem.packed; ++s)
    starts.push_back(starts.back() +
                     pieces(problem, problem.query_starts[s + 1] - problem.query_starts[s]));
  return starts;
}

std::int64_t diagnosis_tasks(const Problem& problem) {
  return problem.sequences() * problem.num_heads;
}

Kernel attention_kernel() { return implementation().attend; }
Kernel diagnosis_kernel() { return implementation().diagnose; }
PagedKernel store_kernel() { return implementation().store_pages; }
PagedKernel paged_attention_kernel() { return implementation().attend_pages; }
PagedKernel weights_kernel() { return implementation().weigh_pages; }
const char* instruction_set() { return implementation().name; }

}  // namespace attnserve
