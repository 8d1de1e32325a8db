"""Open Inference Protocol: models, their counts and the repository, to messages."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from attnserve_proto.inference import open_inference_pb2 as oip

from attnserve_server.models import ports
from attnserve_server.models.catalog import CatalogEntry
from attnserve_server.models.ports import Port
from attnserve_server.models.providers import CUDA
from attnserve_server.models.store import LoadedModel

if TYPE_CHECKING:
    from attnserve_dataplane import InferCounts

# As Triton calls ONNX models that ONNX Runtime runs.
_PLATFORM, _BACKEND = "onnxruntime_onnx", "onnxruntime"


def metadata(model: LoadedModel, versions: Sequence[int]) -> oip.ModelMetadataResponse:
    """What a model takes and gives."""
    return oip.ModelMetadataResponse(
        name=model.manifest.name,
        versions=[str(version) for version in versions],
        platform=_PLATFORM,
        inputs=map(_tensor, ports.inputs(model)),
        outputs=map(_tensor, ports.outputs(model)),
    )


def config(model: LoadedModel, max_batch: int, concurrency: int) -> oip.ModelConfig:
    """The same as Triton's configuration would say it, with the manifest's facts as parameters."""
    manifest, attention = model.manifest, model.manifest.attention
    group = oip.ModelInstanceGroup
    message = oip.ModelConfig(
        name=manifest.name,
        platform=_PLATFORM,
        backend=_BACKEND,
        max_batch_size=max_batch,
        input=[
            oip.ModelInput(
                name=port.name,
                data_type=_data_type(port),
                dims=port.shape[1:],
                optional=port.optional,
            )
            for port in ports.inputs(model)
        ],
        output=[
            oip.ModelOutput(name=port.name, data_type=_data_type(port), dims=port.shape[1:])
            for port in ports.outputs(model)
        ],
        instance_group=[
            group(
                name=manifest.name,
                count=concurrency,
                kind=group.KIND_GPU if model.provider == CUDA else group.KIND_CPU,
            )
        ],
        model_transaction_policy=oip.ModelTransactionPolicy(decoupled=False),
    )
    facts = {
        "kind": manifest.kind,
        "mask": attention.mask,
        "num_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "value_head_dim": attention.value_head_dim,
        "scale": attention.scale,
        "softcap": attention.softcap,
        "variants": ",".join(variant.name for variant in model.attending),
    }
    for name, fact in facts.items():
        message.parameters[name].string_value = str(fact)
    return message


def statistics(model: LoadedModel, counts: "InferCounts") -> oip.ModelStatistics:
    """What was counted of one version of a model."""
    batches = sorted(counts["batches"].items())
    return oip.ModelStatistics(
        name=model.manifest.name,
        version=str(model.manifest.version),
        last_inference=counts["last_inference"],
        inference_count=counts["inferences"],
        execution_count=sum(ran[0] for _, (_, ran, _) in batches),
        inference_stats=oip.InferStatistics(
            success=_duration(counts["success"]),
            fail=_duration(counts["fail"]),
            queue=_duration(counts["queue"]),
            compute_input=_duration(counts["input"]),
            compute_infer=_duration(counts["infer"]),
            compute_output=_duration(counts["output"]),
        ),
        batch_stats=[
            oip.InferBatchStatistics(
                batch_size=size,
                compute_input=_duration(taken),
                compute_infer=_duration(ran),
                compute_output=_duration(given),
            )
            for size, (taken, ran, given) in batches
        ],
    )


def index(entries: Sequence[CatalogEntry]) -> oip.RepositoryIndexResponse:
    """What the repository holds."""
    return oip.RepositoryIndexResponse(
        models=[
            oip.RepositoryIndexResponse.ModelIndex(
                name=entry.name,
                version=str(entry.version),
                state=entry.state,
                reason=entry.reason,
            )
            for entry in entries
        ]
    )


def regions(
    statuses: Iterable[tuple[str, str, int, int]],
) -> oip.SystemSharedMemoryStatusResponse:
    """Registered shared memory: name, key, offset and byte_size of each region."""
    response = oip.SystemSharedMemoryStatusResponse()
    for name, key, offset, byte_size in statuses:
        region = response.regions[name]
        region.name, region.key, region.offset, region.byte_size = name, key, offset, byte_size
    return response


def _tensor(port: Port) -> oip.ModelMetadataResponse.TensorMetadata:
    return oip.ModelMetadataResponse.TensorMetadata(
        name=port.name, datatype=port.datatype, shape=port.shape
    )


def _data_type(port: Port) -> "oip.DataType.ValueType":
    return oip.DataType.Value(f"TYPE_{port.datatype}")


def _duration(duration: tuple[int, int]) -> oip.StatisticDuration:
    count, nanoseconds = duration
    return oip.StatisticDuration(count=count, ns=nanoseconds)
