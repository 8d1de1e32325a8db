"""Server reflection, by grpcio-reflection's own servicer, one message at a time."""

from typing import Any

from attnserve_dataplane import Request
from attnserve_proto import attention_pb2
from attnserve_proto.inference import open_inference_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from attnserve_server.handlers.threads import Method

# The messages of both versions are the same on the wire.
VERSIONS = ("v1", "v1alpha")


def methods() -> dict[str, Method]:
    """By path."""
    modules = (attention_pb2, open_inference_pb2, health_pb2, reflection_pb2)
    pool = DescriptorPool()
    names = []
    for module in modules:
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
        names += [service.full_name for service in module.DESCRIPTOR.services_by_name.values()]
    servicer = reflection.ReflectionServicer(names, pool)

    def reflect(message: bytes, request: Request) -> bytes:
        asked = reflection_pb2.ServerReflectionRequest.FromString(message)
        # A generator that asks nothing of its context.
        answers: Any = servicer.ServerReflectionInfo
        answer: bytes = next(answers(iter([asked]), None)).SerializeToString()
        return answer

    return {
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo": reflect
        for version in VERSIONS
    }
