"""Readers of the load test's options, for argparse and for Locust's own command line."""

from attnserve_proto.commands import values
from attnserve_proto.commands.values import target

__all__ = ["count", "names", "positive_float", "positive_int", "seconds", "seq_lens", "target"]

_LONGEST = 1 << 20

positive_int = values.integer(1)
count = values.integer(0)
positive_float = values.number(0, 1e9, above=True)
seconds = values.some_seconds
names = values.listed(values.name)
seq_lens = values.ascending(values.integer(1, _LONGEST))
