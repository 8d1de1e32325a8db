"""A page on this machine alone: HTTP on 127.0.0.1, for the browser of whoever started it.

Other sites and other users of the machine are kept out: every path begins with a secret that only
the printed address holds; a Host that is not this address (DNS rebinding), an Origin that is not
this page's and a request that a browser says another site made are refused before anything is read.
"""

import errno
import json
import secrets
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from attnserve_client import AttnserveError
from attnserve_proto.commands import CommandError, Progress

from attnserve_lens.live import Viewer
from attnserve_lens.page import live_page

_MOST_BYTES = 8 << 20
_FIELDS = ("model", "text", "pair", "target")
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def serve(viewer: Viewer, first: dict[str, str], port: int = 0) -> None:
    """Serve the page until the process is interrupted; prints one line with its address.

    Args:
        viewer: looks at a server's models.
        first: model, text and pair that the page begins with.
        port: where; 0 is a free one.

    Raises:
        AttnserveError: the server refused.
        CommandError: the port is taken.
        ValueError: the model to begin with is none that takes text.
    """
    names = [each["name"] for each in viewer.models()]
    if first["model"] and first["model"] not in names:
        allowed = ", ".join(names) or "none, the server has no transformer model that takes text"
        raise ValueError(f"--model: given {first['model']}; allowed: {allowed}")
    if first["model"] and first["text"]:
        # Before there is a page, so that it opens at once.
        look = viewer.look(first["model"], first["text"], first["pair"])
        shown = look["maps"][0]["name"]
        with Progress(viewer.answers(shown), "parts of the first layer") as progress:
            viewer.layer(shown, 0, progress.step)
    with PageServer(viewer, first, port) as server:
        print(f"{server.address} shows attention; Ctrl-C ends it", flush=True)
        server.serve_forever(poll_interval=0.1)


class PageServer(ThreadingHTTPServer):
    """The page's server; `address` is what a browser opens."""

    daemon_threads = True

    def __init__(self, viewer: Viewer, first: dict[str, str], port: int = 0) -> None:
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise CommandError(
                f"--port: 127.0.0.1:{port} is taken; give another, or none for a free one"
            ) from None
        self.viewer, self.first = viewer, first
        self.host = f"127.0.0.1:{self.server_address[1]}"
        self.secret = secrets.token_urlsafe(16)

    @property
    def address(self) -> str:
        """The page's address, with its secret."""
        return f"http://{self.host}/{self.secret}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that went away; anything else is a fault to be seen."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _RefusedError(Exception):
    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "attnserve", ""
    timeout = 60  # seconds that a connection may be silent

    def do_GET(self) -> None:
        """The page, or a layer."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """A text to look at."""
        self._answer(self._post)

    def log_message(self, *_: Any) -> None:
        """Requests are not logged: they hold the secret."""

    def _answer(self, work: Any) -> None:
        try:
            path = self._check()
            kind, content = work(path)
            status = HTTPStatus.OK
        except _RefusedError as error:
            # What follows a refused head was not read: it would be taken for the next request.
            self.close_connection = True
            status, kind, content = error.status, "json", {"error": str(error)}
        except ValueError as error:
            status, kind, content = HTTPStatus.BAD_REQUEST, "json", {"error": str(error)}
        except AttnserveError as error:
            status, kind, content = HTTPStatus.BAD_GATEWAY, "json", {"error": str(error)}
        self._send(status, kind, content)

    def _check(self) -> str:
        """What is asked for, behind the secret."""
        if self.headers.get_all("Host") != [self.server.host]:
            raise _RefusedError(
                HTTPStatus.MISDIRECTED_REQUEST, f"Host: allowed: {self.server.host}"
            )
        origin = self.headers.get("Origin")
        if origin not in (None, f"http://{self.server.host}"):
            raise _RefusedError(HTTPStatus.FORBIDDEN, "Origin: allowed: this page's own")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise _RefusedError(HTTPStatus.FORBIDDEN, "another site asked; allowed: this page")
        _, secret, *rest = self.path.split("/", 2)
        if not secrets.compare_digest(secret.encode(), self.server.secret.encode()) or not rest:
            raise _RefusedError(
                HTTPStatus.NOT_FOUND, "not found; open the address that was printed"
            )
        return str(rest[0])

    def _get(self, path: str) -> tuple[str, Any]:
        asked = urlsplit(path)
        if asked.path == "":
            live = {"models": self.server.viewer.models(), **self.server.first}
            facts = "Type a text, pick a model, and look."
            return "html", live_page("Looking at attention", facts, live)
        if asked.path == "layer":
            query = parse_qs(asked.query)
            name, layer = query.get("map", [""])[0], query.get("layer", [""])[0]
            if not (layer.isascii() and layer.isdigit() and len(layer) < 7):
                raise ValueError("layer: not a number; allowed: a layer's place")
            return "bytes", self.server.viewer.layer(name, int(layer))
        raise _RefusedError(HTTPStatus.NOT_FOUND, "not found")

    def _post(self, path: str) -> tuple[str, Any]:
        if path != "look":
            raise _RefusedError(HTTPStatus.NOT_FOUND, "not found")
        # A form of another site cannot send this type without asking first.
        if self.headers.get("Content-Type") != "application/json":
            raise _RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "allowed: application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or int(length) > _MOST_BYTES:
            raise _RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"allowed: {_MOST_BYTES} bytes"
            )
        asked = json.loads(self.rfile.read(int(length)))
        if not isinstance(asked, dict) or not all(isinstance(v, str) for v in asked.values()):
            raise ValueError("body: allowed: an object of texts")
        if not {"model", "text"} <= set(asked) <= set(_FIELDS):
            raise ValueError(f"body: allowed: {', '.join(_FIELDS)}, the first two always")
        return "json", self.server.viewer.look(**asked)

    def _send(self, status: HTTPStatus, kind: str, content: Any) -> None:
        types = {
            "html": "text/html; charset=utf-8",
            "json": "application/json",
            "bytes": "application/octet-stream",
        }
        body = content
        if kind == "json":
            body = json.dumps(content).encode()
        elif kind == "html":
            body = content.encode()
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": types[kind]}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
