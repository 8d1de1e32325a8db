"""Attention by blocks of queries as an ONNX function: plain operators, linear in memory.

A Loop takes a block of queries at a time, cuts out the keys and values that any of them sees, and
does what the reference does on that cut. A block is as long as fits `SCORES` scores, so the memory
does not grow with the length; under a window the cut is at most the window and a block long, so
neither does the time per query. Where the cut grows from block to block, as under a causal mask, it
ends at one of `CUTS` places: CUDA's arena keeps what each size has taken, and gives it to no larger
one, so that as many sizes as blocks would take as much as all scores.
"""

import onnx
from onnx import FunctionProto

from attnserve_export.attention.core import BLOCKED, BLOCKED_SINKS, DOMAIN, AttentionConfig
from attnserve_export.attention.masks import Mask
from attnserve_export.attention.text import exact, joined

# Scores held at once, and bounds for the queries of a block. 4 Mi scores are 16 MiB, of which a
# few copies live at a time.
SCORES = 4 << 20
FEWEST, MOST = 16, 128
CUTS = 16

_ROWS = "float[batch_, heads_, block_, one_]"


def blocked_attention(config: AttentionConfig, opset: int, *, sinks: bool = False) -> FunctionProto:
    """The body of `BlockedAttention(query, key, value, key_lengths) -> output` for a config.

    Args:
        config: masks, heads and positions are fixed by it; rotary embedding happened before.
        opset: of the default domain.
        sinks: make it `BlockedSinksAttention(query, key, value, key_lengths, sinks)`, which gives
            the log-sum-exp too.
    """
    mask = config.visibility
    heads, kv_heads = config.num_heads, config.num_kv_heads
    offsets = "Sub (lengths, query_len)" if mask.bottom_right else "Mul (lengths, zero)"
    reach = _reach(mask)
    width = "key_len" if reach is None else "Min (key_len, window)"
    window = 0 if reach is None else reach + MOST
    lines = [
        "zero = Constant <value_ints = [0]> ()",
        "one = Constant <value_ints = [1]> ()",
        "two = Constant <value_ints = [2]> ()",
        "last = Constant <value_ints = [-1]> ()",
        "scalar = Constant <value_ints: ints = []> ()",
        "query_len = Shape <start = 2, end = 3> (query)",
        "key_len = Shape <start = 2, end = 3> (key)",
        "batch = Shape <start = 0, end = 1> (query)",
        "value_dim = Shape <start = 3, end = 4> (value)",
        f"num_heads = Constant <value_ints = [{heads}]> ()",
        f"num_kv_heads = Constant <value_ints = [{kv_heads}]> ()",
        f"scale = Constant <value_float = {exact(config.scale)}> ()",
        "exact_query = Cast <to = 1> (query)",
        "scaled = Mul (exact_query, scale)",
        "exact_key = Cast <to = 1> (key)",
        # How long a block is.
        f"window = Constant <value_ints = [{window}]> ()",
        f"width = {width if ' ' in width else f'Identity ({width})'}",
        "rows = Mul (batch, num_heads)",
        "scores_per_query = Mul (rows, width)",
        f"budget = Constant <value_ints = [{SCORES}]> ()",
        "fitting = Div (budget, scores_per_query)",
        f"fewest = Constant <value_ints = [{FEWEST}]> ()",
        f"most = Constant <value_ints = [{MOST}]> ()",
        "at_most = Min (fitting, most)",
        "block = Max (at_most, fewest)",
        "above = Add (query_len, block)",
        "rounded_up = Sub (above, one)",
        "blocks = Div (rounded_up, block)",
        "block_scalar = Reshape (block, scalar)",
        "padded_len = Mul (blocks, block)",
        "padding = Sub (padded_len, query_len)",
        "no_padding = Constant <value_ints = [0, 0, 0, 0, 0, 0]> ()",
        "pads = Concat <axis = 0> (no_padding, padding, zero)",
        "padded = Pad (scaled, pads)",
        # Positions: of each sequence's queries, and the extremes.
        "lengths = Min (key_lengths, key_len)",
        f"offsets = {offsets}",
        "column = Constant <value_ints = [1, 1, -1, 1]> ()",
        "four = Constant <value_ints = [-1, 1, 1, 1]> ()",
        "length4 = Reshape (lengths, four)",
        # A weight of 0 does not hide padding that is no number.
        "nothing = Constant <value_float = 0.0> ()",
        "key_len_scalar = Reshape (key_len, scalar)",
        "zero_scalar = Reshape (zero, scalar)",
        "one_scalar = Reshape (one, scalar)",
        "all_keys = Range (zero_scalar, key_len_scalar, one_scalar)",
        "all_keys4 = Reshape (all_keys, column)",
        "valid = Less (all_keys4, length4)",
        "given_value = Cast <to = 1> (value)",
        "exact_value = Where (valid, given_value, nothing)",
        "offset4 = Reshape (offsets, four)",
        "lowest_offset = ReduceMin <keepdims = 1> (offsets)",
        "highest_offset = ReduceMax <keepdims = 1> (offsets)",
        "longest = ReduceMax <keepdims = 1> (lengths)",
        f"left = Constant <value_ints = [{mask.left or 0}]> ()",
        f"right = Constant <value_ints = [{(mask.right or 0) + 1}]> ()",
        "row = Constant <value_ints = [1, 1, 1, -1]> ()",
        f"by_key_head = Constant <value_ints = [0, {kv_heads}, -1, {config.head_dim}]> ()",
        "heads_shape = Concat <axis = 0> (batch, num_heads, block, last)",
        "lowest = Constant <value_float = -3.4028234663852886e+38> ()",
        "axis2 = Constant <value_ints = [2]> ()",
    ]
    if config.slopes is not None:
        slopes = ", ".join(exact(slope) for slope in config.slopes)
        lines += [
            f"slopes_row = Constant <value_floats = [{slopes}]> ()",
            "heads4 = Constant <value_ints = [1, -1, 1, 1]> ()",
            "slopes4 = Reshape (slopes_row, heads4)",
        ]
    if _grows(mask):
        lines += [
            f"cuts = Constant <value_ints = [{CUTS}]> ()",
            "above_keys = Add (key_len, cuts)",
            "up_to_keys = Sub (above_keys, one)",
            "keys_per_cut = Div (up_to_keys, cuts)",
            "cut_step = Max (keys_per_cut, most)",
        ]
    if mask.chunk is not None:
        lines.append(f"chunk = Constant <value_ints = [{mask.chunk}]> ()")
    if config.softcap:
        lines.append(f"cap = Constant <value_float = {exact(config.softcap)}> ()")
    stacked, results = "stacked", "float[batch_, heads_, block_, dim_] block_output"
    if sinks:
        stacked, results = "stacked, rows_stacked", f"{results}, {_ROWS} block_log_sum_exp"
        lines += [
            "heads_of_sinks = Constant <value_ints = [1, -1, 1, 1]> ()",
            "sinks4 = Reshape (sinks, heads_of_sinks)",
            "minus_one = Constant <value_float = -1.0> ()",
            "unseen = Div (minus_one, nothing)",
        ]
    lines += [
        "more = Constant <value = bool {1}> ()",
        "trips = Reshape (blocks, scalar)",
        f"""{stacked} = Loop (trips, more) <body = one_block (int64 i, bool going) =>
        (bool still, {results}) {{
            {joined(_body(config, sinks=sinks))}
        }}>""",
        "in_order = Transpose <perm = [1, 2, 0, 3, 4]> (stacked)",
        "copy = Constant <value_ints = [0, 0, -1]> ()",
        "whole_shape = Concat <axis = 0> (copy, value_dim)",
        "whole = Reshape (in_order, whole_shape)",
        "cut = Slice (whole, zero, query_len, axis2)",
        "output = CastLike (cut, query)",
    ]
    signature = f"{BLOCKED} (query, key, value, key_lengths) => (output)"
    if sinks:
        signature = f"{BLOCKED_SINKS} (query, key, value, key_lengths, sinks)"
        signature += " => (output, log_sum_exp)"
        lines += [
            "rows_in_order = Transpose <perm = [1, 2, 0, 3, 4]> (rows_stacked)",
            "rows_shape = Constant <value_ints = [0, 0, -1]> ()",
            "whole_rows = Reshape (rows_in_order, rows_shape)",
            "log_sum_exp = Slice (whole_rows, zero, query_len, axis2)",
        ]
    text = f"""<domain: "{DOMAIN}", opset_import: ["" : {opset}]>
        {signature} {{ {joined(lines)} }}"""
    return onnx.parser.parse_function(text)


def _reach(mask: Mask) -> int | None:
    """Keys that a query sees at most; None: any number."""
    reaches = [] if mask.chunk is None else [mask.chunk]
    if mask.left is not None and mask.right is not None:
        reaches.append(mask.left + mask.right + 1)
    return min(reaches, default=None)


def _grows(mask: Mask) -> bool:
    """Whether later blocks see more keys than earlier ones, without end."""
    return mask.left is None and mask.right is not None and mask.chunk is None


def _chunk_lines() -> list[str]:
    """What each query sees, and what a block does, cut to chunks.

    Positions before the first key divide to 0, not down: their queries are told apart.
    """
    return [
        "counted = Max (positions, zero)",
        "chunk_number = Div (counted, chunk)",
        "chunk_begin = Mul (chunk_number, chunk)",
        "chunk_stop = Add (chunk_begin, chunk)",
        "chunk_first = Max (first, chunk_begin)",
        "cut_end = Min (end, chunk_stop)",
        "before_all = Less (positions, zero)",
        "chunk_end = Where (before_all, zero, cut_end)",
        "block_lowest = Add (start, lowest_offset)",
        "lowest_counted = Max (block_lowest, zero)",
        "lowest_number = Div (lowest_counted, chunk)",
        "lowest_begin = Mul (lowest_number, chunk)",
        "later_begin = Max (begin_key, lowest_begin)",
        "very_last_key = Sub (key_len, one)",
        "chunk_key = Min (later_begin, very_last_key)",
        "block_above = Add (stop, highest_offset)",
        "block_highest = Sub (block_above, one)",
        "highest_counted = Max (block_highest, zero)",
        "highest_number = Div (highest_counted, chunk)",
        "highest_begin = Mul (highest_number, chunk)",
        "highest_stop = Add (highest_begin, chunk)",
        "chunk_wanted = Min (wanted_end, highest_stop)",
    ]


def _body(config: AttentionConfig, *, sinks: bool) -> list[str]:
    mask = config.visibility
    lines = [
        "still = Identity (going)",
        "start_scalar = Mul (i, block_scalar)",
        "start = Reshape (start_scalar, one)",
        "stop = Add (start, block)",
        "stop_scalar = Add (start_scalar, block_scalar)",
        "queries = Slice (padded, start, stop, axis2)",
        "indices = Range (start_scalar, stop_scalar, one_scalar)",
        "indices4 = Reshape (indices, column)",
        "positions = Add (indices4, offset4)",
    ]
    # The keys that some query of the block sees: begin to end.
    if mask.left is None:
        lines += ["first = Mul (positions, zero)", "begin_key = Identity (zero)"]
    else:
        lines += [
            "reach_left = Sub (positions, left)",
            "first = Max (reach_left, zero)",
            "block_first = Add (start, lowest_offset)",
            "block_left = Sub (block_first, left)",
            "not_before = Max (block_left, zero)",
            "last_key = Sub (key_len, one)",
            "begin_key = Min (not_before, last_key)",
        ]
    if mask.right is None:
        lines += ["end = Identity (length4)", "wanted_end = Identity (longest)"]
    else:
        lines += [
            "reach_right = Add (positions, right)",
            "end = Min (reach_right, length4)",
            "block_last = Add (stop, highest_offset)",
            "block_end = Add (block_last, right)",
            "block_right = Sub (block_end, one)",
            "wanted_end = Min (block_right, longest)",
        ]
    begin, wanted, first, end = "begin_key", "wanted_end", "first", "end"
    if mask.chunk is not None:
        lines += _chunk_lines()
        begin, wanted, first, end = "chunk_key", "chunk_wanted", "chunk_first", "chunk_end"
    if _grows(mask):
        # What lies beyond what the block sees is masked with the rest.
        lines += [
            f"above_wanted = Add ({wanted}, cut_step)",
            "up_to_wanted = Sub (above_wanted, one)",
            "steps_wanted = Div (up_to_wanted, cut_step)",
            "rounded_wanted = Mul (steps_wanted, cut_step)",
            "cut_wanted = Min (rounded_wanted, key_len)",
        ]
        wanted = "cut_wanted"
    lines += [
        f"after_begin = Add ({begin}, one)",
        f"end_key = Max ({wanted}, after_begin)",
        f"keys = Slice (exact_key, {begin}, end_key, axis2)",
        f"values = Slice (exact_value, {begin}, end_key, axis2)",
        "keys_across = Transpose <perm = [0, 1, 3, 2]> (keys)",
        "grouped = Reshape (queries, by_key_head)",
        "products = MatMul (grouped, keys_across)",
    ]
    scores = "products"
    if config.softcap:
        lines += [
            "relative = Div (products, cap)",
            "bent = Tanh (relative)",
            "capped = Mul (bent, cap)",
        ]
        scores = "capped"
    lines += [
        f"by_head = Reshape ({scores}, heads_shape)",
        f"begin_scalar = Reshape ({begin}, scalar)",
        "end_scalar = Reshape (end_key, scalar)",
        "key_numbers = Range (begin_scalar, end_scalar, one_scalar)",
        "numbers4 = Reshape (key_numbers, row)",
    ]
    scores = "by_head"
    if config.alibi:
        lines += [
            "apart = Sub (positions, numbers4)",
            "distance = Abs (apart)",
            "exact_distance = Cast <to = 1> (distance)",
            "penalty = Mul (exact_distance, slopes4)",
            "inclined = Sub (by_head, penalty)",
        ]
        scores = "inclined"
    lines += [
        f"not_before_first = GreaterOrEqual (numbers4, {first})",
        f"before_end = Less (numbers4, {end})",
        "visible = And (not_before_first, before_end)",
        *(_sinking(scores) if sinks else _softmaxed(scores)),
        "products_shape = Shape (products)",
        "grouped_weights = Reshape (weights, products_shape)",
        "sums = MatMul (grouped_weights, values)",
        "sums_by_head = Reshape (sums, heads_shape)",
    ]
    if sinks:
        return [*lines, "block_output = Div (sums_by_head, some_total)"]
    return [
        *lines,
        # A query that sees no key.
        f"some = Less ({first}, {end})",
        "some_or_none = Cast <to = 1> (some)",
        "block_output = Mul (sums_by_head, some_or_none)",
    ]


def _softmaxed(scores: str) -> list[str]:
    return [f"masked = Where (visible, {scores}, lowest)", "weights = Softmax <axis = -1> (masked)"]


def _sinking(scores: str) -> list[str]:
    """Weights that are yet to be divided by `some_total`, where it is not 0, and log-sum-exp."""
    return [
        f"masked = Where (visible, {scores}, unseen)",
        "last_axis = Constant <value_ints = [-1]> ()",
        "highest_score = ReduceMax <keepdims = 1> (masked, last_axis)",
        "highest = Max (highest_score, sinks4)",
        # Any number serves a query that sees nothing.
        "sees_nothing = Equal (highest, unseen)",
        "finite = Where (sees_nothing, nothing, highest)",
        "below = Sub (masked, finite)",
        "weights = Exp (below)",
        "total_of_keys = ReduceSum <keepdims = 1> (weights, last_axis)",
        "sink_below = Sub (sinks4, finite)",
        "of_sink = Exp (sink_below)",
        "total = Add (total_of_keys, of_sink)",
        "unit = Constant <value_float = 1.0> ()",
        "some_total = Where (sees_nothing, unit, total)",
        "log_total = Log (total)",
        "block_log_sum_exp = Add (finite, log_total)",
    ]
