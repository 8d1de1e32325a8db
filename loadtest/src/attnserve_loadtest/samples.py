"""One measured request."""

import time
from dataclasses import dataclass

import grpc
from attnserve_client import AttentionClient, AttnserveError, Timings

from attnserve_loadtest.payloads import Payload


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


@dataclass(frozen=True, slots=True)
class Sample:
    """One request, answered or failed.

    Attributes:
        method: `Attend` or `AttendTokens`.
        model: its name.
        variant: the variant that ran; of a failed request, the one asked for, which may be empty.
        seq_len: the length.
        end_to_end_us: from the call of the SDK to its return, microseconds: packing and unpacking
            in the client, the network, and the server.
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
    try:
        answer = payload.send(client, variant=variant, timeout=timeout)
    except AttnserveError as error:
        failure = Failure(_code_name(error.code), error.message)
    except Exception as error:  # a fault of the client is a failed request, not the end of the test
        failure = Failure(type(error).__name__, str(error))
    else:
        return Sample(
            method=payload.method,
            model=payload.model,
            variant=answer.variant or variant,
            seq_len=payload.seq_len,
            end_to_end_us=(time.perf_counter() - start) * 1e6,
            response_bytes=answer.response_bytes,
            timings=answer.timings,
        )
    return Sample(
        method=payload.method,
        model=payload.model,
        variant=variant,
        seq_len=payload.seq_len,
        end_to_end_us=(time.perf_counter() - start) * 1e6,
        failure=failure,
    )


def _code_name(code: grpc.StatusCode | str) -> str:
    return code.name if isinstance(code, grpc.StatusCode) else str(code)
