"""Memory shared with a server, as the flows of a client use it."""

import grpc
from attnserve_proto import attention_pb2 as pb

from attnserve_client import _errors
from attnserve_client._arena import Arena
from attnserve_client._flows import Call, Flow, Pause
from attnserve_client._sharing import Placed, Sharing
from attnserve_client._transports import Transport

# That a server may take to map shared memory, for callers without a timeout.
_REGISTER_SECONDS = 10.0
# Between two looks at whether another call has registered it.
_CLAIMED_SECONDS = 0.002


class SharingFlows:
    """What keeps the server's knowledge of the memory as it is here."""

    def __init__(self, sharing: Sharing, transport: Transport) -> None:
        self.sharing = sharing
        self._transport = transport

    def registered(self, left: float | None) -> Flow[tuple[Arena, str]]:
        """Memory to share, and the server's name for it: it is registered if it has none.

        Raises:
            AttnserveError: it was not registered.
        """
        while True:
            arena, name = self.sharing.known()
            if name is not None:
                return arena, name
            claimed = self.sharing.claim()
            if claimed is None:
                yield Pause(_CLAIMED_SECONDS)
            else:
                yield from self._register(claimed, left)

    def lost(self, placed: Placed) -> None:
        """What is there had no answer, but may get one: share other memory from now on."""
        if self.sharing.give_up(placed):
            self._transport.unregister(placed.region)

    def _register(self, arena: Arena, left: float | None) -> Flow[None]:
        request = pb.RegisterSharedMemoryRequest(key=arena.key, byte_size=arena.byte_size)
        method, name = "RegisterSharedMemory", None
        try:
            answer: pb.RegisterSharedMemoryResponse = yield Call(
                lambda left: self._transport.unary(method, request, left),
                _REGISTER_SECONDS if left is None else left,
            )
        except grpc.RpcError as error:
            raise _errors.from_rpc_error(error, method) from None
        else:
            name = answer.name
        finally:
            of_use = self.sharing.registered(arena, name)
        if not of_use:
            self._transport.unregister(answer.name)
