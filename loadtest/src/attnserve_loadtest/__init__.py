"""Load tests for attnserve with Locust, and a report of how latency grows with sequence length.

Importing this package patches nothing. `attnserve_loadtest.users` and `attnserve_loadtest.runner`
import Locust, which patches the standard library for gevent: import them before anything that
opens sockets.
"""

__version__ = "0.1.0"
