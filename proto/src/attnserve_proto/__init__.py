"""Messages and stubs of the attnserve API, generated from `proto/attnserve/v1/attention.proto`."""

from attnserve_proto import wire
from attnserve_proto.attnserve.v1 import attention_pb2, attention_pb2_grpc

__all__ = ["attention_pb2", "attention_pb2_grpc", "wire"]
