"""How much memory a computation will take, estimated before it runs."""

# ONNX Runtime's CPU kernels hold the scores of all queries and keys several times over while they
# run: masked, scaled and softmaxed copies. The factor is the largest that was measured over the
# variants, rounded up (benchmarks/memory.py).
SCORE_COPIES = 4


def working_bytes(batch: int, num_heads: int, query_len: int, key_len: int, item_bytes: int) -> int:
    """Bytes that the score matrices of one attention take while it runs."""
    # FP16 is computed in FP32 on the CPU.
    return SCORE_COPIES * batch * num_heads * query_len * key_len * max(item_bytes, 4)
