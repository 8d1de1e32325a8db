// For any processor: vectors of four, which the compiler maps to what there is (SSE, NEON).
#define ATTNSERVE_NAMESPACE generic
#define ATTNSERVE_LANES 4
#define ATTNSERVE_VECTORS 2
#define ATTNSERVE_STEP 4
#include "attention_tiles.inc"
#include "paged_tiles.inc"
#include "paged_weights.inc"
