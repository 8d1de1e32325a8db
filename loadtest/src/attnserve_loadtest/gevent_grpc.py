"""Patches the standard library and grpc for gevent; import it before anything that opens sockets.

Locust runs its users as greenlets of one thread. grpc's Python calls wait in C++ and would block
all of them; `init_gevent` makes a waiting call give way to the other greenlets instead
(https://github.com/grpc/grpc/pull/14561). It must come after the standard library's patch, which
importing Locust does, and before the first channel, so both happen here, once, on import.

Processes that Locust's start are forked by gevent. grpc would start threads of its own in them, and
those abort when `subprocess` closes their files before it becomes the program: it is told not to.
"""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # read when grpc is imported

import locust  # noqa: F401  (patches the standard library)
from grpc.experimental import gevent as _grpc_gevent  # type: ignore[attr-defined]

_grpc_gevent.init_gevent()
