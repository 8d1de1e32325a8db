"""Some heads of an attention, computed by themselves.

Heads do not see each other, so those whose query, key and value have come need not wait for the
others.
"""

from collections.abc import Mapping
from dataclasses import replace

from attnserve_server.dtypes import Array
from attnserve_server.engine.work import AttendWork

# Requests below this are not worth the additional runs.
MIN_BYTES = 2 << 20

# A request is computed in so many parts at the most, unless the answer's chunks hold less each.
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


def part(
    work: AttendWork, feeds: Mapping[str, Array], output: Array, *, counted: bool
) -> AttendWork:
    """The work of some heads.

    Args:
        work: of all heads, divisible.
        feeds: query [1, h, Sq, D], key and value [1, hkv, Sk, D(v)] of these heads.
        output: [1, h, Sq, Dv], to be filled.
        counted: whether this part counts for the whole.
    """
    return replace(
        work,
        feeds={**work.feeds, **feeds},
        into={"output": output},
        kind=(work.kind, output.shape[1]),
        joinable=False,
        counted=work.counted if counted else 0,
    )
