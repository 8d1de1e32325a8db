"""One measured request."""

import time
from dataclasses import dataclass

import grpc
from attnserve_client import AttentionClient, AttnserveError, Timings

from attnserve_loadtest.payloads import Answer, Payload


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that failed.

    Attributes:
        code: name of the gRPC status, e.g. `RESOURCE_EXHAUSTED`; of an error that is none, the
            name of its class.
        message: what the server said.
    """

    code: str
    message: str


# By how much a server's timings may exceed the end to end that they are within: each of the four
# is rounded to a microsecond, and two machines' clocks run at rates up to 1e-4 apart. Beyond that
# they are no spans of this request's time, whatever they are.
_ROUNDING_US, _CLOCK_RATES = 4.0, 1e-4


@dataclass(frozen=True, slots=True)
class Parts:
    """Where the time of an answered request went: spans that follow one another, microseconds.

    None is negative, and together they are the end to end.

    Attributes:
        deserialize, queue, compute, serialize: the server's own.
        wire: end to end less those: packing and unpacking in the client, the network, and tries
            of the SDK before the one that was answered.
    """

    deserialize: float
    queue: float
    compute: float
    serialize: float
    wire: float


@dataclass(frozen=True, slots=True)
class Sample:
    """One request, answered or failed.

    Attributes:
        method: `Attend` or `AttendTokens`.
        model: its name.
        variant: the variant that ran; of a failed request, the one asked for, which may be empty.
        seq_len: the length.
        end_to_end_us: from the call of the SDK, or in an open loop from when the request was due,
            to the return, microseconds: packing and unpacking in the client, the network, and the
            server; the SDK's repeated tries, too.
        response_bytes: bytes of the tensors received.
        timings: the server's own, microseconds; None of a failed request.
        failure: None of an answered request.
    """

    method: str
    model: str
    variant: str
    seq_len: int
    end_to_end_us: float
    response_bytes: int = 0
    timings: Timings | None = None
    failure: Failure | None = None

    def parts(self) -> Parts | None:
        """Where the time went; None of a failed request, and of timings that cannot be spans of it.

        Where the clocks disagree by microseconds, the server's spans are scaled down to fit.
        """
        if self.timings is None:
            return None
        total, whole = self.timings.total, self.end_to_end_us
        if total - whole > _ROUNDING_US + _CLOCK_RATES * whole:
            return None
        scale = min(1.0, whole / total) if total else 1.0
        return Parts(
            deserialize=self.timings.deserialize * scale,
            queue=self.timings.queue * scale,
            compute=self.timings.compute * scale,
            serialize=self.timings.serialize * scale,
            wire=max(0.0, whole - total),
        )


def measure(
    payload: Payload, client: AttentionClient, *, variant: str = "", timeout: float = 30.0
) -> Sample:
    """Send one request and time it.

    Args:
        payload: what to send.
        client: where to.
        variant: empty lets the server pick.
        timeout: seconds.
    """
    start = time.perf_counter()
    answer: Answer | Exception
    try:
        answer = payload.send(client, variant=variant, timeout=timeout)
    except Exception as error:  # a fault of the client is a failed request, not the end of the test
        answer = error
    return sample_of(payload, variant, answer, time.perf_counter() - start)


def sample_of(payload: Payload, variant: str, answer: Answer | Exception, seconds: float) -> Sample:
    """One request that has ended.

    Args:
        payload: what was sent.
        variant: what was asked for.
        answer: what came, or what went wrong.
        seconds: that it took, from whenever counts.
    """
    failure = None
    if isinstance(answer, AttnserveError):
        failure = Failure(_code_name(answer.code), answer.message)
    elif isinstance(answer, Exception):
        failure = Failure(type(answer).__name__, str(answer))
    answered = None if isinstance(answer, Exception) else answer
    return Sample(
        method=payload.method,
        model=payload.model,
        variant=(answered and answered.variant) or variant,
        seq_len=payload.seq_len,
        end_to_end_us=seconds * 1e6,
        response_bytes=answered.response_bytes if answered else 0,
        timings=answered.timings if answered else None,
        failure=failure,
    )


def _code_name(code: grpc.StatusCode | str) -> str:
    return code.name if isinstance(code, grpc.StatusCode) else str(code)
