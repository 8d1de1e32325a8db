"""Messages and stubs, generated from the .proto files, and their encoding without copies.

`attention_pb2` and `wire` are of the attnserve API, `proto/attnserve/v1/attention.proto`;
`attnserve_proto.inference` and `attnserve_proto.inference_wire` of the Open Inference Protocol,
`proto/inference/open_inference.proto`. `attnserve_proto.manifest` is the schema of `model.json`,
`attnserve_proto.commands` what all commands do alike.
"""

from attnserve_proto import wire
from attnserve_proto.attnserve.v1 import attention_pb2, attention_pb2_grpc

__all__ = ["attention_pb2", "attention_pb2_grpc", "wire"]
