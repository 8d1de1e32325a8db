"""Messages and stubs, generated from the .proto files, and their encoding without copies.

`attention_pb2` and `wire` are of the attnserve API, `proto/attnserve/v1/attention.proto`;
`attnserve_proto.inference` and `attnserve_proto.inference_wire` of the Open Inference Protocol,
`proto/inference/open_inference.proto`. `attnserve_proto.manifest` is the schema of `model.json`,
`attnserve_proto.commands` what all commands do alike, `attnserve_proto.starting` what they do
first.

Messages are loaded when they are first asked for: commands begin without them.
"""

TYPE_CHECKING = False  # typing's takes longer to import than all that commands begin with
if TYPE_CHECKING:
    from types import ModuleType

    from attnserve_proto import wire
    from attnserve_proto.attnserve.v1 import attention_pb2, attention_pb2_grpc

__all__ = ["attention_pb2", "attention_pb2_grpc", "wire"]


def __getattr__(name: str) -> "ModuleType":
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    within = "" if name == "wire" else "attnserve.v1."
    module = import_module(f"{__name__}.{within}{name}")
    globals()[name] = module
    return module
