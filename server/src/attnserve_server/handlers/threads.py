"""Threads that take requests from the data plane's queues, and the methods that answer them.

The data plane waits for none of them: a method that hangs holds one thread of its own queue.
"""

import atexit
import logging
import threading
from collections.abc import Callable, Mapping

from attnserve_dataplane import DataPlane, Request, next_log

from attnserve_server import logs
from attnserve_server.handlers.statuses import status_of

Method = Callable[[bytes, Request], bytes]

# Queues and their threads.
_THREADS = {"control": 4, "loading": 4, "tokens": 16, "web_tokens": 1}

# How long a thread waits before it looks whether the server has ended.
_PATIENCE_SECONDS = 0.5

_log = logging.getLogger("attnserve_dataplane")


class HandlerThreads:
    """Runs until `stop`.

    Args:
        plane: whose requests are answered.
        methods: by path, "/package.Service/Method".
    """

    def __init__(self, plane: DataPlane, methods: Mapping[str, Method]) -> None:
        self._plane = plane
        self._methods = methods
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._serve, args=(queue,), name=f"{queue}-{number}")
            for queue, count in _THREADS.items()
            for number in range(count)
        ]
        self._threads.append(threading.Thread(target=self._log, name="log"))
        for thread in self._threads:
            thread.daemon = True  # one that hangs does not keep the process for ever

    def start(self) -> None:
        """Begin to answer."""
        # No thread may be within the data plane when the interpreter goes.
        atexit.register(self.stop)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End once the requests under way are answered, or have had a moment for it."""
        atexit.unregister(self.stop)
        self._stopped.set()
        for thread in self._threads:
            thread.join(2 * _PATIENCE_SECONDS)

    def _serve(self, queue: str) -> None:
        while not self._stopped.is_set():
            request = self._plane.next_request(queue, _PATIENCE_SECONDS)
            if request is not None:
                self._answer(request)

    def _answer(self, request: Request) -> None:
        with logs.traced(request.trace):
            self._answer_traced(request)

    def _answer_traced(self, request: Request) -> None:
        try:
            request.answer(self._methods[request.path](request.message, request))
        except Exception as error:
            code, message, retry_after = status_of(error, request.path.rpartition("/")[2])
            request.fail(int(code), message, retry_after)

    def _log(self) -> None:
        """Bring the data plane's events into Python's logging."""
        while not self._stopped.is_set():
            event = next_log(_PATIENCE_SECONDS)
            if event is not None:
                level, text, fields = event
                _log.log(logging.getLevelName(level.upper()), text, extra=dict(fields))
