"""/metrics over HTTP: one path, few connections at once, each for a few seconds.

Whoever is slow, or asks for something else, costs a thread of a handful and a moment. Where callers
are identified, only those on this machine, and admins by their token, are told anything.
"""

import io
import logging
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from http.client import HTTPMessage, parse_headers

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

_SECONDS = 5.0  # for a request to come, and for its answer to go
_MOST_HEAD = 8192
_MOST_CONNECTIONS = 16
_BACKLOG = 16
_PATIENCE_SECONDS = 0.5

_TEXTS = {
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found",
    405: "Method Not Allowed", 500: "Internal Server Error",
}  # fmt: skip

_log = logging.getLogger(__name__)

Allowed = Callable[[str, str], bool]


class MetricsServer:
    """Serves a registry from threads of its own.

    Args:
        registry: whose metrics are served.
        host: address to listen on.
        port: 0 takes a free one.
        allowed: of the caller's address and its Authorization header, whether it is answered.
        tls: wraps each connection, if there is one.

    Raises:
        OSError: the port cannot be had.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        host: str,
        port: int,
        allowed: Allowed,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._registry = registry
        self._allowed = allowed
        self._tls = tls
        self._places = threading.Semaphore(_MOST_CONNECTIONS)
        self._stopped = threading.Event()
        self._socket = _listen(host, port)
        self.port = int(self._socket.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, name="metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Listen no more."""
        self._stopped.set()
        self._thread.join()
        self._socket.close()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            if not select.select([self._socket], [], [], _PATIENCE_SECONDS)[0]:
                continue
            try:
                connection, address = self._socket.accept()
            except OSError:
                continue  # it has gone again, or there are no descriptors: others may come
            if not self._places.acquire(blocking=False):
                connection.close()
                continue
            thread = threading.Thread(
                target=self._serve, args=(connection, str(address[0])), name="metrics", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # the system gives no thread now; later callers may have one
                connection.close()
                self._places.release()

    def _serve(self, connection: socket.socket, address: str) -> None:
        deadline = time.monotonic() + _SECONDS
        try:
            with connection:
                connection.settimeout(_SECONDS)
                if self._tls is None:
                    self._talk(connection, address, deadline)
                    return
                with self._tls.wrap_socket(connection, server_side=True) as secured:
                    self._talk(secured, address, deadline)
        except (OSError, ValueError):
            pass  # the caller has gone, or was too slow, or does not speak TLS
        except Exception:
            _log.exception("metrics request failed")
        finally:
            self._places.release()

    def _talk(self, connection: socket.socket, address: str, deadline: float) -> None:
        head = _read_head(connection, deadline)
        if head is None:
            return
        status, kind, body = self._answer(head, address)
        lines = [
            f"HTTP/1.1 {status} {_TEXTS[status]}",
            f"Content-Type: {kind}",
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        lines += ["Allow: GET, HEAD"] if status == 405 else []
        lines += ["WWW-Authenticate: Bearer"] if status == 401 else []
        shown = b"" if head.startswith(b"HEAD ") else body
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + shown)
        connection.shutdown(socket.SHUT_WR)

    def _answer(self, head: bytes, address: str) -> tuple[int, str, bytes]:
        line, _, fields = head.partition(b"\r\n")
        words = line.split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _text(400, "this is no request of HTTP/1.1")
        if words[0] not in (b"GET", b"HEAD"):
            return _text(405, "allowed: GET, HEAD")
        if words[1].partition(b"?")[0] != b"/metrics":
            return _text(404, "there is /metrics and nothing else")
        headers: HTTPMessage = parse_headers(io.BytesIO(fields + b"\r\n\r\n"))
        if not self._allowed(address, headers.get("Authorization", "")):
            return _text(401, "allowed: callers on this machine, and admins by their token")
        encoder, kind = choose_encoder(headers.get("Accept", ""))
        try:
            return 200, kind, encoder(self._registry)
        except Exception:
            _log.exception("metrics cannot be collected")
            return _text(500, "the log says why")


def _text(status: int, text: str) -> tuple[int, str, bytes]:
    return status, "text/plain; charset=utf-8", f"{text}\n".encode()


def _listen(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    dual = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server(
        (str(address[0]), port), family=family, backlog=_BACKLOG, dualstack_ipv6=dual
    )


def _read_head(connection: socket.socket, deadline: float) -> bytes | None:
    """What stands before the empty line; None if it does not come in time, or is too long."""
    head = b""
    while b"\r\n\r\n" not in head:
        left = deadline - time.monotonic()
        if left <= 0 or len(head) > _MOST_HEAD:
            return None
        connection.settimeout(left)
        more = connection.recv(_MOST_HEAD)
        if not more:
            return None
        head += more
    return head.partition(b"\r\n\r\n")[0]
