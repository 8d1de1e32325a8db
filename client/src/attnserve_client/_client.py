"""The blocking client."""

import contextlib
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.experimental
import numpy as np
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc

from attnserve_client import (
    _attend,
    _channel,
    _errors,
    _messages,
    _retries,
    _session_files,
    _session_messages,
    _tensors,
)
from attnserve_client._assembly import Assembler
from attnserve_client._attend import AttendCall
from attnserve_client._decode_call import DecodeCall
from attnserve_client._errors import AttnserveError
from attnserve_client._flows import blocking
from attnserve_client._messages import Tokens
from attnserve_client._results import (
    Array,
    AttendResult,
    Model,
    ServerInfo,
    StoredTensor,
    TokensResult,
)
from attnserve_client._session_files import PathOrFile
from attnserve_client._session_messages import METHOD
from attnserve_client._session_opening import OpeningFlows
from attnserve_client._session_state import Connection
from attnserve_client._session_stream import SessionStream, SessionStreams
from attnserve_client._sessions import Batch, Session
from attnserve_client._sharing import SharedCall, Sharing
from attnserve_client._stream import AttendStream

# That a server may take to map shared memory, for callers without a timeout.
_REGISTER_SECONDS = 10.0

# The answers to a single message are read by the thread that sent it, not by one that wakes it.
_ANSWERS_READ_BY_CALLER: list[tuple[str, str | int]] = [
    (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1)
]


class AttentionClient:
    """Calls an attnserve server. Safe to share between threads; close it, or use it in `with`.

    Args:
        target: `host:port`, or any target that grpc understands.
        credentials: for TLS; None is a plaintext channel.
        stream_threshold_bytes: requests whose tensors, both ways, exceed this go over
            AttendStream in chunks.
        shared_memory: put the tensors of `attend`, both ways, into memory shared with the server,
            which must be on this host and run as this user. Arrays that `shared_empty` or `shared`
            made are not copied. A result's arrays take up shared memory as long as they live.
        shared_memory_bytes: how much to share, at most; pages are claimed as arrays need them.

    All calls but those of a stream are repeated, with growing pauses, while no server answers them
    (UNAVAILABLE, CANCELLED by the server, a connection that breaks): until their `timeout`, or,
    without one, for 30 s. So a server may be started anew beneath them.

    The proxy that the environment names, as grpc reads it (`http_proxy`, `no_proxy`), is used for
    every target but those on this host's loopback and Unix sockets.
    """

    def __init__(
        self,
        target: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        stream_threshold_bytes: int = _channel.STREAM_THRESHOLD_BYTES,
        shared_memory: bool = False,
        shared_memory_bytes: int = _channel.SHARED_MEMORY_BYTES,
    ) -> None:
        options = [*_channel.options(target), *_ANSWERS_READ_BY_CALLER]
        self._channel = (
            grpc.secure_channel(target, credentials, options=options)
            if credentials
            else grpc.insecure_channel(target, options=options)
        )
        self._threshold = stream_threshold_bytes
        self._retries = _retries.Retries()
        self._stub = pb_grpc.AttentionServiceStub(self._channel)
        # Raw bytes: the SDK places tensors in messages, and finds them there, without copies.
        self._attend = self._channel.unary_unary(_channel.method_path("Attend"), None, None)
        self._attend_stream = self._channel.stream_stream(
            _channel.method_path("AttendStream"), None, None
        )
        # The same method for requests of one message, which need no thread that sends them.
        self._attend_stream_of_one = self._channel.unary_stream(
            _channel.method_path("AttendStream"), None, None
        )
        self._put_tensor = self._channel.stream_unary(_channel.method_path("PutTensor"), None, None)
        self._decode = self._channel.stream_stream(_channel.method_path(METHOD), None, None)
        self._streams = SessionStreams(lambda: SessionStream(self._start_decode))
        self._runner = self._retries
        self._sessions = Connection(self._streams, self._retries)
        self._flows = OpeningFlows(self._sessions, Session)
        self._sharing = (
            Sharing(shared_memory_bytes, self._register_shared_memory) if shared_memory else None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls under way are cancelled. Arrays live on."""
        self._retries.close()
        self._streams.close()
        if self._sharing is not None:
            self._sharing.close(self._unregister_shared_memory)
        self._channel.close()

    def shared_empty(self, shape: Sequence[int], dtype: Any = np.float32) -> Array:
        """An array in the memory shared with the server, its elements undefined.

        Args:
            shape: of it.
            dtype: float32, float16 or bfloat16, as the model has it.

        Raises:
            RuntimeError: this client shares no memory.
            MemoryError: not so much of it is free.
        """
        return self._shared().arena.empty(tuple(shape), np.dtype(dtype))

    def shared(self, array: Any) -> Array:
        """A copy of an array in the memory shared with the server; errors as `shared_empty`."""
        elements = _tensors.as_array(array, "array")
        copy = self.shared_empty(elements.shape, elements.dtype)
        copy[...] = elements
        return copy

    def _shared(self) -> Sharing:
        if self._sharing is None:
            raise RuntimeError("this client shares no memory; give it shared_memory=True")
        return self._sharing

    def attend(
        self,
        query: Any = None,
        key: Any = None,
        value: Any = None,
        *,
        model: str,
        version: str | int = "",
        variant: str = "",
        hidden_states: Any = None,
        context: Any = None,
        key_lengths: Any = None,
        bias: Any = None,
        scale: float | None = None,
        softcap: float | None = None,
        return_output: bool = True,
        return_weights: bool = False,
        return_entropy: bool = False,
        top_k: int = 0,
        return_mass_per_key: bool = False,
        mass_by_distance: int = 0,
        priority: int = 0,
        timeout: float | None = 60.0,
    ) -> AttendResult:
        """Compute attention.

        Args:
            query: [B, H, Sq, D], for a core model. FP32, FP16 or BF16 as the model is, like all
                tensors. Each tensor may also be a `StoredTensor` that `put_tensor` gave.
            key: [B, Hkv, Sk, D].
            value: [B, Hkv, Sk, Dv].
            model: its name; `client.list_models()` lists them.
            version: empty is the highest.
            variant: force one; empty lets the server pick.
            hidden_states: [B, Sq, E], for a layer model, instead of query, key and value.
            context: [B, Sk, E], for a cross-attention layer.
            key_lengths: [B] integers; keys from that position on are padding.
            bias: added to the scores; [B or 1, H or 1, Sq or 1, Sk or 1].
            scale: multiplies query x key; None is the model's own.
            softcap: None is the model's own, 0 none.
            return_output: also send the output back.
            return_weights: also send the attention weights, [B, H, Sq, Sk].
            return_entropy: also the entropy of each query's weights, nats.
            top_k: also the heaviest keys of each query, this many.
            return_mass_per_key: also the weight each key receives over all queries.
            mass_by_distance: also the weight given at each distance between query and key, for
                this many distances; the last one gathers all beyond.
            priority: who is served first among those that wait: 1 high, 2 or 0 normal, 3 low.
            timeout: seconds; None waits for ever.

        Raises:
            AttnserveError: one subclass per gRPC status.
            TypeError: an argument cannot be read as an array.
            ValueError: a count or the priority is below 0.
            MemoryError: not enough of the memory shared with the server is free.
        """
        call = _attend.attend_call(
            {
                "query": query,
                "key": key,
                "value": value,
                "hidden_states": hidden_states,
                "context": context,
                "key_lengths": key_lengths,
                "bias": bias,
            },
            model=model,
            version=str(version),
            variant=variant,
            scale=scale,
            softcap=softcap,
            no_output=not return_output,
            return_weights=return_weights,
            return_entropy=return_entropy,
            top_k=top_k,
            return_mass_per_key=return_mass_per_key,
            mass_by_distance=mass_by_distance,
            priority=priority,
        )
        if self._sharing is not None:
            answer_bytes = self._sharing.answer_bytes(call)
            if answer_bytes is not None:
                return self._attend_shared(self._sharing, call, answer_bytes, timeout)
        plan = call.plan
        if plan.request_bytes + plan.response_bytes > self._threshold:
            return self._attend_streamed(call, timeout)
        answer = self._retries.call(
            "Attend", lambda left: self._attend(call.to_bytes(), left), timeout
        )
        result, _ = plan.answers.read(answer)
        return result

    def _attend_shared(
        self, sharing: Sharing, call: AttendCall, answer_bytes: int, timeout: float | None
    ) -> AttendResult:
        shared: SharedCall | None = None  # where the request lies, from try to try

        def send(left: float | None) -> tuple[SharedCall, bytes]:
            nonlocal shared
            if shared is None:
                shared = sharing.call(call, answer_bytes, left)
            try:
                return shared, self._attend(shared.message, timeout=left)
            except BaseException as error:  # an interrupt leaves the server computing, too
                if _errors.may_still_run(error):
                    lost, shared = shared, None
                    if sharing.give_up(lost, error):
                        old = pb.UnregisterSharedMemoryRequest(name=lost.region)
                        with contextlib.suppress(ValueError):  # this client has been closed
                            self._stub.UnregisterSharedMemory.future(old, timeout=10.0)
                raise

        def send_again_if_forgotten(left: float | None) -> tuple[SharedCall, bytes]:
            nonlocal shared
            try:
                return send(left)
            except grpc.RpcError as error:
                if shared is None or not _errors.is_unknown_region(error, shared.region):
                    raise
            # The server was started anew, or took this for another caller after a reconnect.
            sharing.forget(shared)
            shared = None
            return send(left)

        return sharing.result(*self._retries.call("Attend", send_again_if_forgotten, timeout))

    def _register_shared_memory(self, key: str, byte_size: int, timeout: float | None) -> str:
        request = pb.RegisterSharedMemoryRequest(key=key, byte_size=byte_size)
        try:
            answer = self._stub.RegisterSharedMemory(
                request, timeout=_REGISTER_SECONDS if timeout is None else timeout
            )
        except grpc.RpcError as error:
            raise _errors.from_rpc_error(error, "RegisterSharedMemory") from None
        return answer.name

    def _unregister_shared_memory(self, name: str) -> None:
        with contextlib.suppress(grpc.RpcError):  # the server may be gone
            request = pb.UnregisterSharedMemoryRequest(name=name)
            self._stub.UnregisterSharedMemory(request, timeout=1.0)

    def _attend_streamed(self, call: AttendCall, timeout: float | None) -> AttendResult:
        def send(left: float | None) -> AttendResult:
            assembler = Assembler()
            assembler.expect(1, call.plan.answers)
            finished = None
            stream = (
                self._attend_stream(call.to_stream(1, None), timeout=left)
                if call.plan.streamed.chunks
                else self._attend_stream_of_one(call.announcement(1, None), timeout=left)
            )
            for message in stream:
                done = assembler.add(message)
                if done is not None:
                    finished = done[1]
                    if isinstance(finished, _errors.AttnserveError):
                        # What is left of the request need not be sent.
                        stream.cancel()  # type: ignore[no-untyped-call]
                        break
            return _errors.result_of(finished, "AttendStream")

        return self._retries.call("AttendStream", send, timeout)

    def stream(self, *, timeout: float | None = None) -> AttendStream:
        """Open one stream for many requests in flight; use it in `with`.

        Nothing is repeated: what fails, fails in its future.

        Args:
            timeout: seconds that the whole stream may last; None is unlimited.
        """
        return AttendStream(self._attend_stream, timeout=timeout)

    def put_tensor(
        self, array: Any, *, lease: float | None = None, timeout: float | None = 60.0
    ) -> StoredTensor:
        """Keep a tensor in the server, for many requests: keys and values of one context, say.

        Args:
            array: a tensor of any shape, dtypes as in `attend`.
            lease: seconds that it is kept after its last use; None is the server's default.
            timeout: seconds; None waits for ever.

        Returns:
            What `attend` takes instead of the array. Whoever knows its handle may use it.

        Raises:
            ResourceExhaustedError: the server keeps as many bytes as it may.
        """
        elements = _tensors.as_array(array, "array")

        def send(left: float | None) -> bytes:
            messages = _messages.put_messages(elements, lease, _channel.CHUNK_BYTES)
            answer: bytes = self._put_tensor(messages, timeout=left)
            return answer

        answer = self._retries.call("PutTensor", send, timeout)
        stored = pb.StoredTensor.FromString(answer)
        return _messages.stored_from(stored, elements.shape, elements.dtype)

    def renew_tensor(
        self, tensor: StoredTensor, *, lease: float | None = None, timeout: float | None = 10.0
    ) -> StoredTensor:
        """Start a stored tensor's lease anew, with another length if one is given.

        Raises:
            NotFoundError: the lease has run out.
        """
        request = pb.RenewTensorRequest(handle=tensor.handle, lease=round((lease or 0) * 1e6))
        answer = self._retries.call(
            "RenewTensor", lambda left: self._stub.RenewTensor(request, timeout=left), timeout
        )
        return _messages.stored_from(answer, tensor.shape, tensor.dtype)

    def drop_tensor(self, tensor: StoredTensor, *, timeout: float | None = 10.0) -> None:
        """Give a stored tensor up.

        Raises:
            NotFoundError: the lease has run out, or the server was started anew.
        """
        self._retries.call(
            "DropTensor",
            lambda left: self._stub.DropTensor(
                pb.DropTensorRequest(handle=tensor.handle), timeout=left
            ),
            timeout,
        )

    session = blocking(OpeningFlows[Session].session)
    sessions = blocking(OpeningFlows[Session].sessions)

    def batch(self, sessions: Sequence[Session]) -> Batch:
        """Steps of several sessions of one model together, each with any number of new tokens.

        Use it in `with`: a step that has not ended then is abandoned.
        """
        return Batch(self._sessions, sessions)

    def save(self, session: Session, to: PathOrFile, *, timeout: float | None = None) -> None:
        """Write a copy of a session into a file, for `load` here or at another server.

        Args:
            session: not in a step. It stays.
            to: a path, or a file open for writing bytes.
            timeout: seconds; None waits for ever.
        """
        export = pb.ExportSession(session_id=session.id)
        message = pb.DecodeRequest(request_id=1, export_session=export).SerializeToString()
        answers = self._answers(iter([message]), timeout)
        _session_files.write(
            to,
            session.model,
            session.num_layers,
            (answer.chunk.data for answer in answers),
        )

    def load(
        self,
        source: PathOrFile,
        *,
        max_tokens: int = 0,
        reserved_tokens: int = 0,
        lease: float | None = None,
        timeout: float | None = None,
    ) -> Session:
        """Open a session from what `save` wrote.

        Args:
            source: a path, or a file open for reading bytes.
            max_tokens: 0 is as saved.
            reserved_tokens, lease: as in `session`.
            timeout: seconds; None waits for ever.

        Raises:
            AttnserveError: DATA_LOSS: the file was changed.
            FailedPreconditionError: this server cannot hold it.
            ValueError: it is no saved session.
        """
        with _session_files.reading(source) as (model, num_layers, chunks):
            messages = _session_messages.import_messages(
                1, chunks, max_tokens, reserved_tokens, lease
            )
            for answer in self._answers(messages, timeout):
                return Session(self._sessions, answer.session, model, num_layers)
        raise _errors.InternalError("the stream ended without an answer", method="Decode")

    def _start_decode(self) -> DecodeCall:
        return DecodeCall(self._channel, _channel.method_path(METHOD), METHOD, ())

    def _answers(
        self, messages: Iterator[bytes], timeout: float | None
    ) -> Iterator[pb.DecodeResponse]:
        """A stream of its own, for what takes long: the answers to some requests.

        Raises:
            AttnserveError: one of them failed, or the stream.
            Exception: what `messages` raises.
        """
        faults: list[Exception] = []

        def guarded() -> Iterator[bytes]:
            try:
                yield from messages
            except Exception as error:  # grpc would but log it
                faults.append(error)

        call = self._decode(guarded(), timeout=timeout)
        try:
            for received in call:
                yield _session_messages.read(received)
        except (grpc.RpcError, AttnserveError) as error:
            if not faults:
                raise _errors.from_call(error, METHOD) from None
        finally:
            call.cancel()  # type: ignore[no-untyped-call]
        if faults:
            raise faults[0]

    def attend_tokens(
        self,
        inputs: Tokens,
        *,
        model: str,
        version: str | int = "",
        variant: str = "",
        targets: Tokens | None = None,
        attention: str = "",
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        return_hidden: bool = True,
        return_pooled: bool = False,
        return_weights: bool | None = None,
        return_entropy: bool = False,
        return_effective_context: bool = False,
        mass_by_distance: int = 0,
        mass_on_first: int = 0,
        truncate: bool = False,
        timeout: float | None = 60.0,
    ) -> TokensResult:
        """Run texts or token ids through a transformer model.

        Args:
            inputs: a list of texts, or a list of id sequences of any lengths (special tokens
                included).
            model: its name.
            version: empty is the highest.
            variant: force one; empty lets the server pick.
            targets: for an encoder-decoder, what its decoder reads: a list of texts, or of id
                sequences (start token included), one for each of `inputs`; None is the start
                token alone.
            attention: "encoder", "decoder" or "cross"; empty is the first that the model has.
            layers: 0-based, for weights and all that is said of them; None is all.
            heads: 0-based, likewise; None is all.
            return_hidden: send the hidden states back.
            return_pooled: also one vector per sequence.
            return_weights: also the attention weights of `layers` and `heads`; None asks for
                them exactly if `layers` or `heads` is given and nothing is asked of the weights
                (the four below).
            return_entropy: also the entropy of each query's weights, nats.
            return_effective_context: also its exponential: over how many keys the weights of each
                query are spread.
            mass_by_distance: also the weight given at each distance between query and key, for
                this many distances; the last one gathers all beyond.
            mass_on_first: also the weight that each query gives to this many first keys.
            truncate: cut texts that are too long instead of refusing them.
            timeout: seconds; None waits for ever.

        Raises:
            AttnserveError: one subclass per gRPC status.
        """
        request = _messages.tokens_request(
            inputs,
            model=model,
            version=str(version),
            variant=variant,
            targets=targets,
            attention=attention,
            layers=layers,
            heads=heads,
            return_hidden=return_hidden,
            return_pooled=return_pooled,
            return_weights=return_weights,
            return_entropy=return_entropy,
            return_effective_context=return_effective_context,
            mass_by_distance=mass_by_distance,
            mass_on_first=mass_on_first,
            truncate=truncate,
        )
        return _messages.tokens_result(
            self._retries.call(
                "AttendTokens", lambda left: self._stub.AttendTokens(request, timeout=left), timeout
            )
        )

    def list_models(self, *, timeout: float | None = 10.0) -> list[Model]:
        """All models and versions, by name and version."""
        answer = self._retries.call(
            "ListModels",
            lambda left: self._stub.ListModels(pb.ListModelsRequest(), timeout=left),
            timeout,
        )
        return [_messages.model_from(model) for model in answer.models]

    def get_model(
        self, name: str, version: str | int = "", *, timeout: float | None = 10.0
    ) -> Model:
        """One model, its manifest included.

        Raises:
            NotFoundError: no such model or version.
        """
        request = pb.GetModelRequest(name=name, version=str(version))
        answer = self._retries.call(
            "GetModel", lambda left: self._stub.GetModel(request, timeout=left), timeout
        )
        return _messages.model_from(answer.model, answer.manifest_json)

    def server_info(self, *, timeout: float | None = 10.0) -> ServerInfo:
        """What the server is, what it runs on and what it accepts."""
        answer = self._retries.call(
            "ServerInfo",
            lambda left: self._stub.ServerInfo(pb.ServerInfoRequest(), timeout=left),
            timeout,
        )
        return _messages.server_info_from(answer)
