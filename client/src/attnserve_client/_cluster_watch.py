"""What goes on beside a client's calls: how its servers are."""

from typing import TypeVar

import grpc
from attnserve_proto import encoding

from attnserve_client import _errors
from attnserve_client._cluster import Cluster, Member
from attnserve_client._flows import Call, Flow, Pause
from attnserve_client._session_state import SessionState

S = TypeVar("S", bound=SessionState)

# A server in trouble is asked how it is after so many seconds; one that serves after so many times
# that, or when a call has failed. What its answer may take, seconds.
_LOOK_SECONDS, _SERVING_LOOKS, _ANSWER_SECONDS = 0.25, 4, 2.0

# HealthCheckResponse with status 1, SERVING (https://github.com/grpc/grpc-proto, grpc/health/v1).
_SERVING = encoding.tag(1, 0) + encoding.varint(1)


def watch(cluster: Cluster[S], member: Member[S]) -> Flow[None]:
    """See to a member, until the client is closed, or it is removed and nothing is on it."""
    while not member.removed or member.busy:
        if not member.removed:
            cluster.told(member, (yield from _trouble(member)))
        for _ in range(_SERVING_LOOKS):
            if (yield Pause(_LOOK_SECONDS)):
                return
            if member.trouble or member.removed:
                break
    cluster.left(member)
    yield Call(lambda left: member.server.close(), None)


def _trouble(member: Member[S]) -> Flow[str]:
    """Why a server does not serve; empty: it does."""
    try:
        answer: bytes = yield Call(member.server.transport.health, _ANSWER_SECONDS)
    except grpc.RpcError as error:
        failure = _errors.from_rpc_error(error, "Check")
        if failure.code == grpc.StatusCode.UNIMPLEMENTED:
            return ""  # as grpc's own clients have it: a server without health checks serves
        if failure.code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"no answer within {_ANSWER_SECONDS:g} s"
        return f"{failure.code.name}: {failure.message}"
    except Exception as error:  # of grpc, to whoever uses what was closed
        return f"cannot be asked: {error}"
    return "" if answer == _SERVING else "not serving: it drains, or has yet to begin"
