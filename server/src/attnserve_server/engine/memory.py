"""How much memory a computation will take, estimated before it runs."""

from attnserve_server.repository.manifest import VariantEntry

# ONNX Runtime's CPU kernels hold the scores of all queries and keys several times over while they
# run: masked, scaled and softmaxed copies. The server's peak memory grew by 0.8 to 2.2 times the
# scores with `fused` and by 4.8 to 5.3 times with `reference`, weights in the answer, at 2048 and
# 4096 positions (8 heads of 64, FP32); rounded up.
SCORE_COPIES = 6

# `blocked` holds some copies of a block of scores at a time, and its tensors in FP32 besides;
# `native` some tiles per thread. Rounded up from docs/kernels.md.
BLOCK_BYTES = 128 << 20
TILE_BYTES = 16 << 20


def working_bytes(
    variant: VariantEntry,
    batch: int,
    num_heads: int,
    query_len: int,
    key_len: int,
    tensor_bytes: int,
    *,
    growing_blocks: bool = False,
) -> int:
    """Bytes that one attention takes while it runs, beyond what comes in and goes out.

    Args:
        variant: that runs.
        batch, num_heads, query_len, key_len: its sizes.
        tensor_bytes: of what comes in and goes out.
        growing_blocks: whether `blocked` runs on CUDA with more keys from block to block, as under
            a causal mask.
    """
    scores = 4 * batch * num_heads * query_len * key_len
    if variant.quadratic:
        # Scores are FP32 for every dtype on the CPU.
        return SCORE_COPIES * scores
    if variant.native:
        return TILE_BYTES + 2 * tensor_bytes
    # Twice: FP16 tensors are computed in FP32; and the blocks are put together at the end.
    linear = BLOCK_BYTES + 4 * tensor_bytes
    # CUDA's arena does not reuse what a smaller block had: measured to come to all scores, once.
    return linear + scores if growing_blocks and variant.name == "blocked" else linear
