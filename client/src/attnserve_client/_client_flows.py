"""The calls of a client, whoever waits for them."""

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar, Unpack

import grpc
from attnserve_proto import attention_pb2 as pb

from attnserve_client import _arguments as arguments
from attnserve_client import _attend, _errors, _messages, _session_files, _tensors
from attnserve_client import _session_messages as session_messages
from attnserve_client._answers import with_starts
from attnserve_client._attend import AttendCall, AttendOptions
from attnserve_client._channel import CHUNK_BYTES
from attnserve_client._errors import AttnserveError
from attnserve_client._flows import Call, Flow
from attnserve_client._messages import Tokens, TokensOptions
from attnserve_client._results import (
    AttendResult,
    Model,
    ServerInfo,
    StoredTensor,
    TokensResult,
)
from attnserve_client._retries import again, all_again, once
from attnserve_client._session_files import PathOrFile
from attnserve_client._session_messages import METHOD, MOST_TOKENS
from attnserve_client._session_opening import OpeningFlows
from attnserve_client._session_state import Connection, SessionState
from attnserve_client._sharing import SharedCall
from attnserve_client._sharing_flows import SharingFlows
from attnserve_client._transports import Transport

S = TypeVar("S", bound=SessionState)


class ClientFlows(OpeningFlows[S]):
    """The calls of one client.

    Args:
        transport: to the server.
        threshold: requests with more bytes of tensors, both ways, go over AttendStream.
        memory: shared with the server, if any is.
        connection: what sessions share.
        make: a session of the client.
        patient: whether calls are tried until their time is up; else once.
    """

    def __init__(
        self,
        transport: Transport,
        threshold: int,
        memory: SharingFlows | None,
        connection: Connection,
        make: Callable[[Connection, pb.SessionState, str, int], S],
        *,
        patient: bool = True,
    ) -> None:
        super().__init__(connection, make, patient=patient)
        self._tries = all_again if patient else once
        self._transport = transport
        self._threshold = threshold
        self._memory = memory

    def attend(
        self,
        query: Any = None,
        key: Any = None,
        value: Any = None,
        *,
        timeout: float | None = 60.0,
        **options: Unpack[AttendOptions],
    ) -> Flow[AttendResult]:
        """Compute attention.

        Args:
            query: [B, H, Sq, D], for a core model. FP32, FP16 or BF16 as the model is, like all
                tensors. Each tensor may also be a `StoredTensor` that `put_tensor` gave.
            key: [B, Hkv, Sk, D].
            value: [B, Hkv, Sk, Dv].
            timeout: seconds; None waits for ever.
            options: `model` and more: see `AttendOptions`.

        Raises:
            AttnserveError: one subclass per gRPC status.
            TypeError: an argument cannot be read as an array.
            ValueError: a count or the priority is below 0.
            MemoryError: not enough of the memory shared with the server is free.
        """
        call = _attend.attend_call(query, key, value, **options)
        if self._memory is not None:
            answer_bytes = self._memory.sharing.answer_bytes(call)
            if answer_bytes is not None:
                return (yield from self._attend_shared(self._memory, call, answer_bytes, timeout))
        plan, transport = call.plan, self._transport
        if plan.request_bytes + plan.response_bytes > self._threshold:
            result: AttendResult = yield from again(
                "AttendStream",
                lambda left: transport.attend_streamed(call, left),
                timeout,
                self._tries,
            )
            return result
        answer = yield from again(
            "Attend", lambda left: transport.attend(call.to_bytes(), left), timeout, self._tries
        )
        return with_starts(plan.answers.read(answer)[0], call.starts)

    def _attend_shared(
        self, memory: SharingFlows, call: AttendCall, answer_bytes: int, timeout: float | None
    ) -> Flow[AttendResult]:
        sharing = memory.sharing
        shared: SharedCall | None = None  # where the request lies, from try to try

        def attempt(left: float | None) -> Flow[tuple[SharedCall, bytes]]:
            nonlocal shared
            if shared is None:
                arena, name = yield from memory.registered(left)
                shared = sharing.call(call, answer_bytes, arena, name)
            message = shared.message
            try:
                return shared, (
                    yield Call(lambda left: self._transport.attend(message, left), left)
                )
            except BaseException as error:  # an interrupt leaves the server computing, too
                if _errors.may_still_run(error):
                    lost, shared = shared, None
                    memory.lost(lost.placed)
                raise

        def attempt_again_if_forgotten(left: float | None) -> Flow[tuple[SharedCall, bytes]]:
            nonlocal shared
            try:
                return (yield from attempt(left))
            except grpc.RpcError as error:
                if shared is None or not _errors.is_unknown_region(error, shared.placed.region):
                    raise
            # The server was started anew, or took this for another caller after a reconnect.
            sharing.forget(shared.placed)
            shared = None
            return (yield from attempt(left))

        result = sharing.result(
            *(yield from self._tries("Attend", attempt_again_if_forgotten, timeout))
        )
        return with_starts(result, call.starts)

    def put_tensor(
        self, array: Any, *, lease: float | None = None, timeout: float | None = 60.0
    ) -> Flow[StoredTensor]:
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
        kept = arguments.microseconds("lease", lease)

        def send(left: float | None) -> Any:
            return self._transport.put(_messages.put_messages(elements, kept, CHUNK_BYTES), left)

        answer = yield from again("PutTensor", send, timeout, self._tries)
        stored = pb.StoredTensor.FromString(answer)
        return _messages.stored_from(
            stored, elements.shape, elements.dtype, _messages.kept_integers(elements)
        )

    def renew_tensor(
        self, tensor: StoredTensor, *, lease: float | None = None, timeout: float | None = 10.0
    ) -> Flow[StoredTensor]:
        """Start a stored tensor's lease anew, with another length if one is given.

        Raises:
            NotFoundError: the lease has run out.
        """
        arguments.kind("tensor", tensor, StoredTensor, "what put_tensor gave")
        kept = arguments.microseconds("lease", lease)
        request = pb.RenewTensorRequest(handle=tensor.handle, lease=kept)
        answer = yield from self._unary("RenewTensor", request, timeout)
        return _messages.stored_from(answer, tensor.shape, tensor.dtype, tensor.integers)

    def drop_tensor(self, tensor: StoredTensor, *, timeout: float | None = 10.0) -> Flow[None]:
        """Give a stored tensor up.

        Raises:
            NotFoundError: the lease has run out, or the server was started anew.
        """
        arguments.kind("tensor", tensor, StoredTensor, "what put_tensor gave")
        yield from self._unary("DropTensor", pb.DropTensorRequest(handle=tensor.handle), timeout)

    def attend_tokens(
        self,
        inputs: Tokens | None = None,
        *,
        timeout: float | None = 60.0,
        **options: Unpack[TokensOptions],
    ) -> Flow[TokensResult]:
        """Run texts, token ids, or what a model reads in their place through a transformer model.

        Args:
            inputs: a list of texts, of pairs of texts (each one sequence, by the tokenizer's own
                template), or of id sequences of any lengths (special tokens included); or what a
                tokenizer or processor of transformers gives. None if one of the tensors is given
                by its name.
            timeout: seconds; None waits for ever.
            options: `model` and more: see `TokensOptions`.

        Raises:
            AttnserveError: one subclass per gRPC status.
            TypeError: nothing is given to read, or more than one thing, or it is no array.
        """
        request = _messages.tokens_request(inputs, **options)
        answer = yield from self._unary("AttendTokens", request, timeout)
        return _messages.tokens_result(answer, request)

    def list_models(self, *, timeout: float | None = 10.0) -> Flow[list[Model]]:
        """All models and versions, by name and version."""
        answer = yield from self._unary("ListModels", pb.ListModelsRequest(), timeout)
        return [_messages.model_from(model) for model in answer.models]

    def get_model(
        self, name: str, version: str | int = "", *, timeout: float | None = 10.0
    ) -> Flow[Model]:
        """One model, its manifest included.

        Raises:
            NotFoundError: no such model or version.
        """
        request = pb.GetModelRequest(
            name=arguments.text("name", name, empty=False),
            version=arguments.version("version", version),
        )
        answer = yield from self._unary("GetModel", request, timeout)
        return _messages.model_from(answer.model, answer.manifest_json)

    def server_info(self, *, timeout: float | None = 10.0) -> Flow[ServerInfo]:
        """What the server is, what it runs on and what it accepts."""
        answer = yield from self._unary("ServerInfo", pb.ServerInfoRequest(), timeout)
        return _messages.server_info_from(answer)

    def _unary(self, method: str, request: Any, timeout: float | None) -> Flow[Any]:
        def send(left: float | None) -> Any:
            return self._transport.unary(method, request, left)

        return again(method, send, timeout, self._tries)

    def save(self, session: S, to: PathOrFile, *, timeout: float | None = None) -> Flow[None]:
        """Write a copy of a session into a file, for `load` here or at another server.

        Args:
            session: not in a step. It stays.
            to: a path, or a file open for writing bytes.
            timeout: seconds; None waits for ever.
        """
        arguments.kind("session", session, SessionState, "a session")
        timeout = arguments.seconds("timeout", timeout)
        with _session_files.writing(to, session.model, session.num_layers) as write:
            yield from _exported(session, write, timeout)

    def load(
        self,
        source: PathOrFile,
        *,
        max_tokens: int = 0,
        reserved_tokens: int = 0,
        lease: float | None = None,
        timeout: float | None = None,
    ) -> Flow[S]:
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
        answers: list[pb.DecodeResponse] = []
        timeout = arguments.seconds("timeout", timeout)
        room = (
            arguments.integer("max_tokens", max_tokens, 0, MOST_TOKENS),
            arguments.integer("reserved_tokens", reserved_tokens, 0, MOST_TOKENS),
            arguments.microseconds("lease", lease),
        )
        with _session_files.reading(source) as (model, num_layers, chunks):
            messages = session_messages.import_messages(1, chunks, *room)
            yield Call(lambda left: self._transport.decode(messages, answers.append, left), timeout)
        if not answers:
            raise _errors.InternalError("the stream ended without an answer", method=METHOD)
        session = self._make(self._connection, answers[0].session, model, num_layers)
        # The stream that is told if it moves is to be that of all sessions, not the one above.
        with contextlib.suppress(AttnserveError):
            yield from session._renewing(None, timeout)
        return session


def _exported(
    session: SessionState, write: Callable[[bytes], object], timeout: float | None
) -> Flow[None]:
    """Write the chunks of a session, from wherever it is."""

    def take(answer: pb.DecodeResponse) -> None:
        write(answer.chunk.data)

    def export(transport: Transport) -> Call:
        asked = pb.ExportSession(session_id=session.id)
        message = pb.DecodeRequest(request_id=1, export_session=asked).SerializeToString()
        return Call(lambda left: transport.decode(iter([message]), take, left), timeout)

    while True:
        connection = session._here()
        try:
            yield export(connection.transport)
        except AttnserveError as error:
            if not connection.moves.follows(error):
                raise
        else:
            return
