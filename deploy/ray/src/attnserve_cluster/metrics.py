"""What a server's `/metrics` says of its load."""

import ssl
import time
import urllib.error
import urllib.request
from collections import deque
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from attnserve_cluster.scaling import Measured

_ANSWER_SECONDS = 5.0
_MOST_ANSWER = 64 << 20
# Requests of so many seconds are looked at together: those of one say little.
_WINDOW_SECONDS = 5.0


class MetricsError(Exception):
    """They cannot be read; the message says why."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What stood there at one time; counts since the server began.

    Attributes:
        at: on the monotonic clock.
        requests, queue_seconds: computed requests, and what they waited.
        sessions, kv_bytes, kv_most: as in `Measured`.
    """

    at: float
    requests: float
    queue_seconds: float
    sessions: int
    kv_bytes: float
    kv_most: float


@dataclass(frozen=True, slots=True)
class MetricsPlace:
    """Where they are.

    Attributes:
        url: of them.
        certificate: PEM file of the server's own chain, which it must show; empty: no TLS.
        token_file: with an admin's token, read each time; empty: none.
    """

    url: str
    certificate: str = ""
    token_file: str = ""

    def read(self) -> Reading:
        """What stands there now. It waits.

        Raises:
            MetricsError: they cannot be read.
        """
        request = urllib.request.Request(self.url)
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        try:
            if self.token_file:
                token = Path(self.token_file).read_text("ascii").strip()
                request.add_header("Authorization", f"Bearer {token}")
            if self.certificate:
                handlers.append(urllib.request.HTTPSHandler(context=_trusting(self.certificate)))
            opener = urllib.request.build_opener(*handlers)
            with opener.open(request, timeout=_ANSWER_SECONDS) as answer:
                return reading_of(answer.read(_MOST_ANSWER).decode())
        except urllib.error.HTTPError as error:
            wanted = "; it wants an admin's token: --metrics-token-file" * (error.code == 401)
            raise MetricsError(f"{self.url}: {error.code} {error.reason}{wanted}") from None
        except (OSError, ValueError, HTTPException) as error:
            raise MetricsError(f"{self.url}: {error}") from None


def reading_of(text: str) -> Reading:
    """What such a text says.

    Raises:
        ValueError: it is not one of an attnserve server.
    """
    requests = queue_seconds = 0.0
    gauges: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get("part") == "queue":
                requests += sample.value if sample.name == "attnserve_request_seconds_count" else 0
                if sample.name == "attnserve_request_seconds_sum":
                    queue_seconds += sample.value
            elif sample.name.startswith("attnserve_kv_"):
                gauges[sample.name] = sample.value
    try:
        return Reading(
            time.monotonic(),
            requests,
            queue_seconds,
            int(gauges["attnserve_kv_sessions"]),
            gauges["attnserve_kv_promised_bytes"],
            gauges["attnserve_kv_max_bytes"],
        )
    except KeyError as missing:
        raise ValueError(f"has no {missing}; allowed: metrics of attnserve-server") from None


class Window:
    """The readings of the last seconds, of one run of a server."""

    def __init__(self, seconds: float = _WINDOW_SECONDS) -> None:
        self._seconds = seconds
        self._readings: deque[Reading] = deque()

    def add(self, reading: Reading) -> Measured:
        """What there was between a reading so long ago and this one."""
        self._readings.append(reading)
        while len(self._readings) > 2 and self._readings[1].at <= reading.at - self._seconds:
            self._readings.popleft()
        first = self._readings[0]
        return Measured(
            reading.requests - first.requests,
            reading.queue_seconds - first.queue_seconds,
            reading.sessions,
            reading.kv_bytes,
            reading.kv_most,
        )


def _trusting(certificate: str) -> ssl.SSLContext:
    """Of a client that takes this very chain, whatever name it is for."""
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context
