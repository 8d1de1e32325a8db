"""What callers send to each method, valid as it stands, for a server with the model `causal`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from attnserve_proto.inference import open_inference_pb2 as oip
from google.protobuf.message import Message

HEADS, DIM, PAGE_TOKENS = 4, 8, 16
_LEASE = 20_000_000
_SECONDS = 60.0
_SESSIONS = 16
_GENERATOR = np.random.default_rng(0)


@dataclass(frozen=True)
class Method:
    """One method and what is sent to it.

    Attributes:
        path: "/package.Service/Method".
        weight: how often it is called, beside others.
        is_stream: whether callers send several messages.
        calls: the messages of valid calls.
        always_ok: whether all of them are answered OK, as often as they are sent.
    """

    path: str
    request: type[Message]
    response: type[Message]
    weight: int
    is_stream: bool
    calls: tuple[tuple[Message, ...], ...]
    always_ok: bool = True

    @property
    def name(self) -> str:
        """Without its service."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Kept:
    """What a server keeps, for messages to name."""

    sessions: tuple[str, ...]
    chunks: tuple[pb.SessionChunk, ...]
    handle: str
    renewed: str


def tensor(*shape: int) -> pb.Tensor:
    """Random numbers."""
    elements = _GENERATOR.standard_normal(shape).astype(np.float32)
    return pb.Tensor(dtype=pb.FP32, shape=shape, data=elements.tobytes())


def integers(*values: int) -> pb.Tensor:
    """A vector of INT64."""
    elements = np.array(values, np.int64)
    return pb.Tensor(dtype=pb.INT64, shape=[len(values)], data=elements.tobytes())


def keep(address: str) -> Kept:
    """Let a server keep sessions and a tensor."""
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.AttentionServiceStub(channel)
        (opened,) = stub.Decode(iter([_open(1, _SESSIONS)]), timeout=_SECONDS)
        names = tuple(session.session_id for session in opened.opened.sessions)
        if len(names) != _SESSIONS:
            raise RuntimeError(f"no sessions: {opened}")
        steps = (request for at, name in enumerate(names) for request in _fill(2 * at + 1, name))
        for answer in stub.Decode(steps, timeout=_SECONDS):
            if answer.HasField("error"):
                raise RuntimeError(answer.error.message)
        export = pb.DecodeRequest(
            request_id=1, export_session=pb.ExportSession(session_id=names[0])
        )
        exported = stub.Decode(iter([export]), timeout=_SECONDS)
        chunks = tuple(answer.chunk for answer in exported)
        header = pb.PutTensorHeader(tensor=tensor(1, HEADS, 3, DIM), lease=_LEASE)
        put = pb.PutTensorRequest(header=header)
        handles = [stub.PutTensor(iter([put]), timeout=_SECONDS).handle for _ in range(2)]
    return Kept(names, chunks, *handles)


def methods(kept: Kept) -> list[Method]:
    """All methods of both services."""
    return [*_attention(kept), *_open_inference()]


def _attention(kept: Kept) -> list[Method]:
    def one(name: str, weight: int, response: type[Message], *requests: Message, ok: bool = True
            ) -> Method:  # fmt: skip
        calls = tuple((request,) for request in requests)
        path = f"/attnserve.v1.AttentionService/{name}"
        return Method(path, type(requests[0]), response, weight, False, calls, ok)

    def several(name: str, weight: int, response: type[Message], *calls: tuple[Message, ...],
                ok: bool = True) -> Method:  # fmt: skip
        path = f"/attnserve.v1.AttentionService/{name}"
        return Method(path, type(calls[0][0]), response, weight, True, calls, ok)

    tokens = pb.TokenBatch(sequences=[pb.TokenSequence(ids=[1, 2, 3], token_type_ids=[0, 0, 1])])
    texts = pb.TextBatch(texts=["some words", "ä"], pairs=["others", ""], truncate=True)
    return [
        one("Attend", 200, pb.AttendResponse, *_attends(kept)),
        several("AttendStream", 150, pb.AttendStreamResponse, *_attend_streams(kept)),
        one("AttendTokens", 20, pb.AttendTokensResponse,
            pb.AttendTokensRequest(model="causal", tokens=tokens, returns=pb.TokenReturnOptions(
                weights=True, layers=[0, 1], heads=[0])),
            pb.AttendTokensRequest(model="causal", text=texts, target_text=texts),
            pb.AttendTokensRequest(model="causal", tensors=[
                pb.InputTensor(name="pixel_values", tensor=tensor(1, 3, 4, 4), lengths=[1])]),
            ok=False),
        several("Decode", 220, pb.DecodeResponse, *_decodes(kept), ok=False),
        several("PutTensor", 30, pb.StoredTensor, *_puts()),
        one("RenewTensor", 20, pb.StoredTensor,
            pb.RenewTensorRequest(handle=kept.renewed, lease=_LEASE), ok=False),
        one("DropTensor", 20, pb.DropTensorResponse, pb.DropTensorRequest(handle="unknown"),
            ok=False),
        one("RegisterSharedMemory", 20, pb.RegisterSharedMemoryResponse,
            pb.RegisterSharedMemoryRequest(key="/attnserve-no-such-object", byte_size=4096),
            ok=False),
        one("UnregisterSharedMemory", 20, pb.UnregisterSharedMemoryResponse,
            pb.UnregisterSharedMemoryRequest(name="unknown"), ok=False),
        one("ListModels", 3, pb.ListModelsResponse, pb.ListModelsRequest()),
        one("GetModel", 10, pb.GetModelResponse, pb.GetModelRequest(name="causal", version="1")),
        one("ServerInfo", 3, pb.ServerInfoResponse, pb.ServerInfoRequest()),
    ]  # fmt: skip


def _attends(kept: Kept) -> Iterator[pb.AttendRequest]:
    query, more = tensor(1, HEADS, 3, DIM), tensor(2, HEADS, 5, DIM)
    mask = pb.Tensor(dtype=pb.BOOL, shape=[1, 1, 3, 3], data=b"\1\0\0\1\1\0\1\1\1")
    core = pb.AttendRequest(model="causal", query=query, key=query, value=query)

    def with_(**others: Any) -> pb.AttendRequest:
        request = pb.AttendRequest(**others)
        whole = pb.AttendRequest()
        whole.CopyFrom(core)
        whole.MergeFrom(request)
        return whole

    yield core
    yield pb.AttendRequest(model="causal", version="1", query=more, key=more, value=more,
                           key_lengths=integers(3, 5), priority=1)  # fmt: skip
    yield with_(returns=pb.ReturnOptions(weights=True, entropy=True, log_sum_exp=True))
    yield with_(returns=pb.ReturnOptions(no_output=True, top_k=2, mass_per_key=True,
                                         mass_by_distance=3))  # fmt: skip
    yield with_(bias=tensor(1, 1, 3, 3), scale=0.5, softcap=20.0, sinks=tensor(HEADS))
    yield with_(bias=mask, prefix_lengths=integers(2), padding=b"\0" * 7)
    yield with_(cu_seqlens_q=integers(0, 1, 3), cu_seqlens_k=integers(0, 1, 3))
    stored = pb.Tensor(dtype=pb.FP32, shape=[1, HEADS, 3, DIM], stored=kept.handle)
    yield pb.AttendRequest(model="causal", query=query, key=stored, value=stored)


def _attend_streams(kept: Kept) -> Iterator[tuple[pb.AttendStreamRequest, ...]]:
    whole = [pb.AttendStreamRequest(request_id=at, request=request)
             for at, request in enumerate(_attends(kept), 1)]  # fmt: skip
    yield tuple(whole[:4])
    yield tuple(whole[4:])
    announced = pb.AttendRequest(model="causal")
    content = tensor(1, HEADS, 4, DIM)
    for name in ("query", "key", "value"):
        part = getattr(announced, name)
        part.dtype = pb.FP32
        part.shape.extend(content.shape)
        part.chunked.byte_size = len(content.data)
    chunked = [pb.AttendStreamRequest(request_id=3, request=announced, timeout=60_000_000)]
    half = len(content.data) // 2
    for number in (4, 5, 6):
        for at in (0, half):
            chunk = pb.TensorChunk(tensor=number, offset=at, data=content.data[at : at + half])
            chunked.append(pb.AttendStreamRequest(request_id=3, chunk=chunk))
    yield tuple(chunked)


def _open(request_id: int, count: int, **others: Any) -> pb.DecodeRequest:
    session = pb.NewSession(max_tokens=4096, reserved_tokens=64)
    opened = pb.OpenSessions(model="causal", num_layers=2, lease=_LEASE, sessions=[session] * count,
                             **others)  # fmt: skip
    return pb.DecodeRequest(request_id=request_id, open=opened)


def _fill(request_id: int, name: str, tokens: int = 3) -> Iterator[pb.DecodeRequest]:
    """A step of one session, both layers."""
    for layer in range(2):
        attend = pb.AttendLayer(step_id=request_id - request_id % 2 + 1, layer=layer)
        for part in (attend.query, attend.key, attend.value):
            part.CopyFrom(tensor(tokens, HEADS, DIM))
        if layer == 0:
            attend.begin.sessions.add(session_id=name, new_tokens=tokens)
        yield pb.DecodeRequest(request_id=request_id + layer, attend_layer=attend)


def _decodes(kept: Kept) -> Iterator[tuple[pb.DecodeRequest, ...]]:
    def request(number: int, **action: Any) -> pb.DecodeRequest:
        return pb.DecodeRequest(request_id=number, **action)

    def parts(layer: int, tokens: int) -> tuple[pb.AttendLayer, pb.AttendLayer]:
        returns = pb.LayerReturns(log_sum_exp=True, weights_of=[0, 1])
        query = pb.AttendLayer(step_id=7, layer=layer, query=tensor(tokens, HEADS, DIM),
                               returns=returns)  # fmt: skip
        keys = pb.AttendLayer(step_id=7, layer=layer, key=tensor(tokens, HEADS, DIM),
                              value=tensor(tokens, HEADS, DIM))  # fmt: skip
        return query, keys

    for at in range(0, len(kept.sessions) - 1, 2):
        one, two = kept.sessions[at], kept.sessions[at + 1]
        both = [pb.SessionStep(session_id=one, new_tokens=2),
                pb.SessionStep(session_id=two, new_tokens=1)]  # fmt: skip
        step = pb.BeginStep(step_id=7, sessions=both)
        calls = [request(1, begin_step=step)]
        for layer in range(2):
            calls += [request(2 + layer, attend_layer=part) for part in parts(layer, 3)]
        calls.append(request(4, truncate=pb.TruncateSession(session_id=one, length=3)))
        calls.append(request(5, renew=pb.RenewSession(session_id=two, lease=_LEASE)))
        yield tuple(calls)
        tree = pb.SessionStep(session_id=one, new_tokens=3, parents=[-1, 0, 0])
        yield (
            request(1, begin_step=pb.BeginStep(step_id=9, sessions=[tree])),
            *(_as(each, 9) for each in _fill(2, one)),
            request(4, commit=pb.CommitTree(session_id=one, accepted=[0, 2])),
            request(5, truncate=pb.TruncateSession(session_id=one, length=3)),
            request(6, fork=pb.ForkSession(session_id=one, length=2, lease=1_000_000)),
        )
        asked = pb.SessionStep(session_id=two, new_tokens=2)
        queries = pb.AttendLayer(step_id=3, layer=1, query=tensor(2, HEADS, DIM))
        queries.begin.CopyFrom(pb.BeginStep(sessions=[asked], queries_only=True, priority=2))
        yield (
            request(1, attend_layer=queries),
            request(2, abandon_step=pb.AbandonStep(step_id=3)),
            request(3, export_session=pb.ExportSession(session_id=two)),
            request(4, close=pb.CloseSession(session_id="unknown")),
        )
    yield (
        _open(1, 2, cache_type=pb.CACHE_INT8,
              layers=[pb.LayerSpec(window=32, kept_first=2), pb.LayerSpec()]),
        _open(2, 1, layers=[pb.LayerSpec(latent=True)]),
        *(request(3, import_session=pb.ImportSession(chunk=chunk, lease=1_000_000))
          for chunk in kept.chunks),
    )  # fmt: skip


def _as(request: pb.DecodeRequest, step_id: int) -> pb.DecodeRequest:
    """Of a step that was begun."""
    request.attend_layer.step_id = step_id
    request.attend_layer.ClearField("begin")
    return request


def _puts() -> Iterator[tuple[pb.PutTensorRequest, ...]]:
    whole = tensor(1, HEADS, 3, DIM)
    yield (pb.PutTensorRequest(header=pb.PutTensorHeader(tensor=whole, lease=1_000_000)),)
    announced = pb.Tensor(dtype=pb.FP32, shape=whole.shape)
    announced.chunked.byte_size = len(whole.data)
    half = len(whole.data) // 2
    chunks = [pb.TensorChunk(offset=at, data=whole.data[at : at + half]) for at in (0, half)]
    yield (
        pb.PutTensorRequest(header=pb.PutTensorHeader(tensor=announced, lease=1_000_000)),
        *(pb.PutTensorRequest(chunk=chunk) for chunk in chunks),
    )


def _open_inference() -> list[Method]:
    def one(name: str, weight: int, response: type[Message], *requests: Message, ok: bool = True,
            is_stream: bool = False) -> Method:  # fmt: skip
        single = tuple((request,) for request in requests)
        calls: tuple[tuple[Message, ...], ...] = (requests,) if is_stream else single
        path = f"/inference.GRPCInferenceService/{name}"
        return Method(path, type(requests[0]), response, weight, is_stream, calls, ok)

    return [
        one("ModelInfer", 150, oip.ModelInferResponse, *_infers()),
        one("ModelStreamInfer", 100, oip.ModelStreamInferResponse, *_infers(), is_stream=True),
        one("ServerLive", 3, oip.ServerLiveResponse, oip.ServerLiveRequest()),
        one("ServerReady", 3, oip.ServerReadyResponse, oip.ServerReadyRequest()),
        one("ServerMetadata", 3, oip.ServerMetadataResponse, oip.ServerMetadataRequest()),
        one("ModelReady", 10, oip.ModelReadyResponse,
            oip.ModelReadyRequest(name="causal", version="1")),
        one("ModelMetadata", 5, oip.ModelMetadataResponse,
            oip.ModelMetadataRequest(name="causal", version="1")),
        one("ModelConfig", 5, oip.ModelConfigResponse,
            oip.ModelConfigRequest(name="causal", version="1")),
        one("ModelStatistics", 3, oip.ModelStatisticsResponse,
            oip.ModelStatisticsRequest(name="causal", version="1")),
        one("RepositoryIndex", 3, oip.RepositoryIndexResponse,
            oip.RepositoryIndexRequest(ready=True)),
        one("RepositoryModelLoad", 3, oip.RepositoryModelLoadResponse,
            oip.RepositoryModelLoadRequest(model_name="unknown"), ok=False),
        one("RepositoryModelUnload", 3, oip.RepositoryModelUnloadResponse,
            oip.RepositoryModelUnloadRequest(model_name="unknown"), ok=False),
        one("SystemSharedMemoryStatus", 5, oip.SystemSharedMemoryStatusResponse,
            oip.SystemSharedMemoryStatusRequest()),
        one("SystemSharedMemoryRegister", 5, oip.SystemSharedMemoryRegisterResponse,
            oip.SystemSharedMemoryRegisterRequest(
                name="region", key="/attnserve-no-such-object", byte_size=4096), ok=False),
        one("SystemSharedMemoryUnregister", 5, oip.SystemSharedMemoryUnregisterResponse,
            oip.SystemSharedMemoryUnregisterRequest(name="region")),
    ]  # fmt: skip


def _infers() -> Iterator[oip.ModelInferRequest]:
    shape = [1, HEADS, 3, DIM]
    content = tensor(*shape)
    raw = oip.ModelInferRequest(model_name="causal", model_version="1", id="some")
    typed = oip.ModelInferRequest(model_name="causal")
    for name in ("query", "key", "value"):
        raw.inputs.add(name=name, datatype="FP32", shape=shape)
        raw.raw_input_contents.append(content.data)
        part = typed.inputs.add(name=name, datatype="FP32", shape=shape)
        part.contents.fp32_contents.extend(np.frombuffer(content.data, np.float32))
    yield raw
    raw.inputs.add(name="key_lengths", datatype="INT64", shape=[1])
    raw.raw_input_contents.append(integers(2).data)
    raw.parameters["priority"].uint64_param = 1
    raw.parameters["timeout"].int64_param = 60_000_000
    raw.outputs.add(name="output")
    yield raw
    lengths = typed.inputs.add(name="key_lengths", datatype="INT64", shape=[1])
    lengths.contents.int64_contents.append(3)
    typed.outputs.add(name="output").parameters["binary_data"].bool_param = True
    yield typed
