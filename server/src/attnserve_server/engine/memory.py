"""How much memory a computation will take, estimated before it runs."""

# ONNX Runtime's CPU kernels hold the scores of all queries and keys several times over while they
# run: masked, scaled and softmaxed copies. The server's peak memory grew by 0.8 to 2.2 times the
# scores with `fused` and by 4.8 to 5.3 times with `reference`, weights in the answer, at 2048 and
# 4096 positions (8 heads of 64, FP32); rounded up.
SCORE_COPIES = 6


def working_bytes(batch: int, num_heads: int, query_len: int, key_len: int, item_bytes: int) -> int:
    """Bytes that the score matrices of one attention take while it runs."""
    # FP16 is computed in FP32 on the CPU.
    return SCORE_COPIES * batch * num_heads * query_len * key_len * max(item_bytes, 4)
