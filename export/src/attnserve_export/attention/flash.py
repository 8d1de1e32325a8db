"""Attention for CUDA as ONNX functions: nodes that ONNX Runtime runs by fused kernels.

A mask given as a tensor keeps ONNX Runtime from FlashAttention (docs/kernels.md says what else
does), so there is none. `FlashAttention` gives lengths as the Attention operator's own input,
`nonpad_kv_seqlen`, which it has since opset 24
(https://onnx.ai/onnx/operators/onnx__Attention.html). With that input the operator aligns causal
queries to the last valid key. Queries aligned to the first key take two passes if rows are ragged:
a causal one for queries before the end of their sequence, and one over all valid keys for those
after it.

ONNX Runtime's GroupQueryAttention alone has windows, and takes cuDNN's kernel for prompts; what it
does with padding depends on the kernel, so it serves batches without any.
"""

import onnx
from onnx import FunctionProto

from attnserve_export.attention.core import BLOCKED, CUDNN, DOMAIN, FLASH, AttentionConfig
from attnserve_export.attention.text import exact, joined

# The first with nonpad_kv_seqlen.
OPSET = 24
_CONTRIB = "com.microsoft"
WIDEST = 256  # head_dim of FlashAttention's kernels


def has_flash(config: AttentionConfig, dtype: str) -> bool:
    """Whether there is such a form.

    Args:
        config: the attention.
        dtype: "FP32", "FP16" or "BF16". FP32 has no FlashAttention, but without a mask ONNX Runtime
            takes another kernel of linear memory; windows have none.
    """
    plain = not (config.softcap or config.alibi or config.chunk is not None or config.sinks)
    regular = config.head_dim == config.value_head_dim and config.head_dim % 8 == 0
    causal_window = config.mask == "causal" and dtype != "FP32"
    return (
        plain and regular and config.head_dim <= WIDEST and (not config.windowed or causal_window)
    )


def has_cudnn(config: AttentionConfig, dtype: str) -> bool:
    """Whether there is a form by GroupQueryAttention that `FlashAttention` isn't yet."""
    return (
        has_flash(config, dtype)
        and dtype != "FP32"
        and config.mask != "cross"
        and not config.windowed
    )


def flash_attention(config: AttentionConfig) -> FunctionProto:
    """The body of `FlashAttention(query, key, value, key_lengths) -> output` for a config.

    Args:
        config: one that `has_flash`. With a window, the graph needs `BlockedAttention` as well.
    """
    if config.window is not None:
        lines = _grouped(config, BLOCKED)
    elif config.mask != "causal":
        lines = _by_lengths(config, causal=False)
    elif config.visibility.bottom_right:
        lines = _by_lengths(config, causal=True)
    else:
        lines = _top_left(config)
    return _function(FLASH, lines)


def cudnn_attention(config: AttentionConfig) -> FunctionProto:
    """The body of `CudnnAttention`, as `flash_attention`; the graph needs that one as well.

    Args:
        config: one that `has_cudnn`.
    """
    return _function(CUDNN, _grouped(config, FLASH))


def _function(name: str, lines: list[str]) -> FunctionProto:
    sizes = [
        "scalar = Constant <value_ints: ints = []> ()",
        "query_len = Shape <start = 2, end = 3> (query)",
        "key_len = Shape <start = 2, end = 3> (key)",
        "lengths = Min (key_lengths, key_len)",
        "shortest = ReduceMin <keepdims = 1> (lengths)",
    ]
    text = f"""<domain: "{DOMAIN}",
        opset_import: ["" : {OPSET}, "{_CONTRIB}" : 1, "{DOMAIN}" : 1]>
        {name} (query, key, value, key_lengths) => (output) {{ {joined([*sizes, *lines])} }}"""
    return onnx.parser.parse_function(text)


def _attention(
    config: AttentionConfig, output: str, lengths: str, *, causal: bool, heads: str = "key, value"
) -> str:
    attributes = f"is_causal = {int(causal)}, scale = {exact(config.scale)}"
    return f"{output} = Attention <{attributes}> (query, {heads}, , , , {lengths})"


# `valid_key` and `valid_value`: 0 where they are padding. A kernel that gives padding a weight of 0
# would make NaN of a NaN there.
_VALID = """
    zero_scalar = Constant <value_int = 0> ()
    one_scalar = Constant <value_int = 1> ()
    key_len_scalar = Reshape (key_len, scalar)
    keys = Range (zero_scalar, key_len_scalar, one_scalar)
    by_row = Constant <value_ints = [1, 1, -1, 1]> ()
    keys4 = Reshape (keys, by_row)
    by_sequence = Constant <value_ints = [-1, 1, 1, 1]> ()
    lengths4 = Reshape (lengths, by_sequence)
    valid = Less (keys4, lengths4)
    exact_zero = Constant <value_float = 0.0> ()
    nothing = CastLike (exact_zero, key)
    valid_key = Where (valid, key, nothing)
    valid_value = Where (valid, value, nothing)
"""
_VALID_HEADS = "valid_key, valid_value"


def _by_lengths(config: AttentionConfig, *, causal: bool) -> list[str]:
    given = _attention(config, "same", "lengths", causal=causal)
    masked = _attention(config, "masked", "lengths", causal=causal, heads=_VALID_HEADS)
    return [
        "enough = GreaterOrEqual (shortest, key_len)",
        "unpadded = Reshape (enough, scalar)",
        f"""output = If (unpadded) <
            then_branch = all_alike () => (same) {{ {given} }},
            else_branch = ragged () => (masked) {{ {_VALID} {masked} }}>""",
    ]


def _top_left(config: AttentionConfig) -> list[str]:
    return [
        "full = GreaterOrEqual (shortest, key_len)",
        "unpadded = Reshape (full, scalar)",
        # Queries at or after the end of their sequence are there only if one is shorter than this.
        "shorter = Min (query_len, key_len)",
        "enough = GreaterOrEqual (shortest, shorter)",
        "before_ends = Reshape (enough, scalar)",
        f"""output = If (unpadded) <
            then_branch = all_alike () => (same) {{
                {_attention(config, "same", "", causal=True)}
            }},
            else_branch = padded () => (masked) {{
                {_VALID}
                masked = If (before_ends) <
                    then_branch = none_after () => (seen) {{
                        {_attention(config, "seen", "", causal=True, heads=_VALID_HEADS)}
                    }},
                    else_branch = ragged () => (chosen) {{
                        {_attention(config, "causal", "", causal=True, heads=_VALID_HEADS)}
                        {
            _attention(config, "to_the_end", "lengths", causal=False, heads=_VALID_HEADS)
        }
                        query_len_scalar = Reshape (query_len, scalar)
                        rows = Range (zero_scalar, query_len_scalar, one_scalar)
                        rows4 = Reshape (rows, by_row)
                        within = Less (rows4, lengths4)
                        chosen = Where (within, causal, to_the_end)
                    }}>
            }}>""",
    ]


def _grouped(config: AttentionConfig, otherwise: str) -> list[str]:
    """GroupQueryAttention for self-attention without padding, else another function."""
    attributes = ", ".join(
        (
            f"num_heads = {config.num_heads}",
            f"kv_num_heads = {config.num_kv_heads}",
            f"scale = {exact(config.scale)}",
            f"causal = {int(config.mask == 'causal')}",
            f"local_window_size = {config.window or -1}",
        )
    )
    merged = [
        line
        for name in ("query", "key", "value")
        for line in (
            f"{name}_across = Transpose <perm = [0, 2, 1, 3]> ({name})",
            f"{name}_rows = Reshape ({name}_across, merge)",
        )
    ]
    return [
        "as_long = Equal (query_len, key_len)",
        "enough = GreaterOrEqual (shortest, key_len)",
        "both = And (as_long, enough)",
        "unpadded = Reshape (both, scalar)",
        # Out here ONNX Runtime computes sizes on the CPU, where the operator wants the total.
        "one = Constant <value_ints = [1]> ()",
        "last_keys = Sub (lengths, one)",
        "last_keys32 = Cast <to = 6> (last_keys)",
        "total = Reshape (key_len, scalar)",
        "total32 = Cast <to = 6> (total)",
        f"""output = If (unpadded) <
            then_branch = all_alike () => (by_head) {{
                merge = Constant <value_ints = [0, 0, -1]> ()
                {joined(merged)}
                rows, present_key, present_value = {_CONTRIB}.GroupQueryAttention <{attributes}>
                    (query_rows, key_rows, value_rows, , , last_keys32, total32)
                split = Constant <value_ints = [0, 0, {config.num_heads}, -1]> ()
                split_rows = Reshape (rows, split)
                by_head = Transpose <perm = [0, 2, 1, 3]> (split_rows)
            }},
            else_branch = ragged () => (elsewhere) {{
                elsewhere = {DOMAIN}.{otherwise} (query, key, value, key_lengths)
            }}>""",
    ]
