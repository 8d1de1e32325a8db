"""Some heads of an attention, computed by themselves.

Heads do not see each other, so those whose query, key and value have come need not wait for the
others.
"""

from dataclasses import replace

from attnserve_server.engine.work import AttendWork

# Requests below this are not worth the additional runs.
MIN_BYTES = 2 << 20

# A request is computed in so many parts at the most.
MOST_PARTS = 4


def divisible(work: AttendWork) -> bool:
    """Whether heads of a work can be computed by themselves.

    Of one sequence only: the heads of several do not lie side by side. With the output alone:
    the operator that gives it takes any number of heads.
    """
    wanted = work.wanted
    return (
        work.dims.batch == 1
        and work.tensor_bytes >= MIN_BYTES
        and work.variant.session.any_heads
        and work.joinable
        and not (wanted.weights or wanted.diagnosed)
    )


def part(work: AttendWork, first: int, last: int, *, counted: bool) -> AttendWork:
    """The work of some heads, over the same memory.

    Args:
        work: divisible.
        first, last: heads of key and value, the last excluded; those of query follow from them.
        counted: whether this part counts for the whole.
    """
    attention = work.model.manifest.attention
    sharing = attention.num_heads // attention.num_kv_heads
    heads = slice(first * sharing, last * sharing)
    feeds = {
        **work.feeds,
        "query": work.feeds["query"][:, heads],
        "key": work.feeds["key"][:, first:last],
        "value": work.feeds["value"][:, first:last],
    }
    return replace(
        work,
        feeds=feeds,
        into={"output": work.into["output"][:, heads]},
        kind=(work.kind, last - first),
        joinable=False,
        counted=work.counted if counted else 0,
    )
