"""RegisterSharedMemory and UnregisterSharedMemory: memory shared with callers on this host."""

import grpc
from attnserve_proto import attention_pb2 as pb

from attnserve_server.shared_memory import SharedRegions, owner_of


class SharedMemoryService:
    """These methods of `attnserve.v1.AttentionService`."""

    def __init__(self, regions: SharedRegions) -> None:
        self._regions = regions

    def register(
        self, message: pb.RegisterSharedMemoryRequest, context: grpc.ServicerContext
    ) -> pb.RegisterSharedMemoryResponse:
        """Map an object of the caller's."""
        owner = owner_of(context.peer())
        name = self._regions.register_private(message.key, message.byte_size, owner)
        return pb.RegisterSharedMemoryResponse(name=name)

    def unregister(
        self, message: pb.UnregisterSharedMemoryRequest, context: grpc.ServicerContext
    ) -> pb.UnregisterSharedMemoryResponse:
        """Unmap it."""
        self._regions.unregister(message.name, owner_of(context.peer()))
        return pb.UnregisterSharedMemoryResponse()
