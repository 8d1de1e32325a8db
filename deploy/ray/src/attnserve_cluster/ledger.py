"""What a cluster's controller must not forget, kept by Ray beside its own tables.

Ray starts an actor that died again as it was made the first time. The table is Ray's internal one
of keys and values (`ray.experimental.internal_kv`), where Ray's own libraries keep such things; it
is as durable as the Ray cluster's head.
"""

import json

from ray.experimental import internal_kv

from attnserve_cluster.plan import NAMESPACE
from attnserve_cluster.scaling import Bounds


class Ledger:
    """The bounds and the number of servers of one cluster.

    Args:
        identity: of the cluster.
    """

    def __init__(self, identity: str) -> None:
        self._key = f"attnserve-cluster/{identity}".encode()

    def read(self) -> tuple[Bounds, int] | None:
        """What was written last; None: nothing was."""
        written = internal_kv._internal_kv_get(self._key, namespace=NAMESPACE.encode())
        if written is None:
            return None
        least, most, target = json.loads(written)
        return Bounds(least, most), target

    def write(self, bounds: Bounds, target: int) -> None:
        """Keep them."""
        written = json.dumps([bounds.least, bounds.most, target]).encode()
        internal_kv._internal_kv_put(self._key, written, namespace=NAMESPACE.encode())

    def forget(self) -> None:
        """Keep nothing more."""
        internal_kv._internal_kv_del(self._key, namespace=NAMESPACE.encode())
