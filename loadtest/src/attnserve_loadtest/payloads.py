"""Inputs for a model at one sequence length, made once and used again for every request.

Random numbers of the model's dtype, or random token ids; a generator with a fixed seed, so that
two runs send the same bytes. Nothing here is measured.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from attnserve_client import (
    AsyncAttentionClient,
    AttendResult,
    AttentionClient,
    Model,
    ServerInfo,
    Timings,
    TokensResult,
)
from numpy.typing import NDArray

from attnserve_loadtest.errors import LoadTestError

Array = NDArray[Any]

# By the name that a model's description has.
DTYPES: dict[str, Any] = {"FP32": np.float32, "FP16": np.float16, "BF16": ml_dtypes.bfloat16}


@dataclass(frozen=True, slots=True)
class Answer:
    """What matters of an answer.

    Attributes:
        variant: the variant that ran.
        response_bytes: bytes of the tensors received; the framing around them is not counted.
        timings: the server's own, in microseconds.
    """

    variant: str
    response_bytes: int
    timings: Timings


@dataclass(frozen=True, slots=True)
class AttendPayload:
    """One `Attend` request.

    Attributes:
        model: the model's name.
        seq_len: S; queries and keys alike.
        batch: B.
        tensors: by argument name: `query`, `key` and `value` of a core model,
            `hidden_states` (and `context`) of a layer.
    """

    model: str
    seq_len: int
    batch: int
    tensors: dict[str, Array]

    method: ClassVar[str] = "Attend"

    @property
    def request_bytes(self) -> int:
        """Bytes of all tensors of the request."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def send(self, client: AttentionClient, *, variant: str, timeout: float) -> Answer:
        """Make the call.

        Args:
            client: where to.
            variant: empty lets the server pick.
            timeout: seconds.

        Raises:
            AttnserveError: the call failed.
        """
        return self.answer(self.ask(client, variant=variant, timeout=timeout))

    def ask(
        self, client: AttentionClient | AsyncAttentionClient, *, variant: str, timeout: float
    ) -> Any:
        """What `client.attend` gives: an `AttendResult`, or of an asyncio client one to await."""
        return client.attend(
            self.tensors.get("query"),
            self.tensors.get("key"),
            self.tensors.get("value"),
            hidden_states=self.tensors.get("hidden_states"),
            context=self.tensors.get("context"),
            model=self.model,
            variant=variant,
            timeout=timeout,
        )

    def answer(self, result: AttendResult) -> Answer:
        """What matters of what `ask` gave."""
        size = 0 if result.output is None else result.output.nbytes
        return Answer(result.variant, size, result.timings)


@dataclass(frozen=True, slots=True)
class TokensPayload:
    """One `AttendTokens` request.

    Attributes:
        model: the model's name.
        seq_len: tokens of each sequence.
        batch: sequences.
        ids: B lists of seq_len token ids.
    """

    model: str
    seq_len: int
    batch: int
    ids: list[list[int]]

    method: ClassVar[str] = "AttendTokens"

    @property
    def request_bytes(self) -> int:
        """Bytes of the token ids as INT64, which is what the server makes of them."""
        return 8 * self.batch * self.seq_len

    def send(self, client: AttentionClient, *, variant: str, timeout: float) -> Answer:
        """Make the call; arguments and errors as those of `AttendPayload.send`."""
        return self.answer(self.ask(client, variant=variant, timeout=timeout))

    def ask(
        self, client: AttentionClient | AsyncAttentionClient, *, variant: str, timeout: float
    ) -> Any:
        """What `client.attend_tokens` gives; of an asyncio client, to await."""
        return client.attend_tokens(self.ids, model=self.model, variant=variant, timeout=timeout)

    def answer(self, result: TokensResult) -> Answer:
        """What matters of what `ask` gave."""
        size = sum(hidden.nbytes for hidden in result.hidden or ())
        return Answer(result.variant, size, result.timings)


Payload = AttendPayload | TokensPayload


def make_payload(model: Model, seq_len: int, *, batch: int = 1, seed: int = 0) -> Payload:
    """The inputs of one request to `model`, whatever its kind.

    Args:
        model: as the server describes it.
        seq_len: queries and keys alike, or tokens.
        batch: sequences.
        seed: of the random numbers.
    """
    random = np.random.default_rng([seed, seq_len, batch])
    if model.kind == "transformer":
        ids = random.integers(0, model.vocab_size, (batch, seq_len)).tolist()
        return TokensPayload(model.name, seq_len, batch, ids)
    dtype = DTYPES[model.dtype]
    tensors = {
        name: random.standard_normal(shape, np.float32).astype(dtype, copy=False)
        for name, shape in _tensor_shapes(model, seq_len, batch).items()
    }
    return AttendPayload(model.name, seq_len, batch, tensors)


def row_name(model: str, variant: str, seq_len: int) -> str:
    """How Locust's statistics call a (model, variant, seq_len).

    Args:
        model: its name.
        variant: the one that ran or was asked for; empty: the server's choice is not known.
        seq_len: the length.
    """
    return f"{model}/{variant or 'auto'}/seq_len={seq_len}"


def check_request(
    model: Model, server: ServerInfo, *, variant: str, seq_lens: Sequence[int], batch: int
) -> None:
    """Refuse up front what the server would refuse later.

    Args:
        model: as the server describes it.
        server: whose limits apply.
        variant: empty lets the server pick.
        seq_lens: all lengths to send.
        batch: sequences of each request.

    Raises:
        LoadTestError: an unknown variant, a length or batch over a limit.
    """
    known = [each.name for each in model.variants]
    if variant and known and variant not in known:
        raise LoadTestError(
            f"model {model.name!r} has no variant {variant!r}; it has: {', '.join(known)}"
        )
    limits = {
        f"the max_seq_len of model {model.name!r}": model.max_seq_len,
        "the max_seq_len of the server": server.limits.max_seq_len,
    }
    for what, limit in limits.items():
        too_long = [str(seq_len) for seq_len in seq_lens if limit and seq_len > limit]
        if too_long:
            raise LoadTestError(f"seq_len {', '.join(too_long)} is over {what}, {limit}")
    if server.limits.max_batch and batch > server.limits.max_batch:
        raise LoadTestError(
            f"batch {batch} is over the max_batch of the server, {server.limits.max_batch}"
        )
    needed = _request_bytes(model, max(seq_lens), batch)
    if server.limits.max_request_bytes and needed > server.limits.max_request_bytes:
        raise LoadTestError(
            f"seq_len {max(seq_lens)} needs {needed:,} bytes a request; "
            f"the max_request_bytes of the server is {server.limits.max_request_bytes:,}"
        )


def _tensor_shapes(model: Model, seq_len: int, batch: int) -> dict[str, tuple[int, ...]]:
    if model.kind == "layer":
        shapes: dict[str, tuple[int, ...]] = {"hidden_states": (batch, seq_len, model.embed_dim)}
        if model.mask == "cross":
            shapes["context"] = (batch, seq_len, _context_dim(model))
        return shapes
    return {
        "query": (batch, model.num_heads, seq_len, model.head_dim),
        "key": (batch, model.num_kv_heads, seq_len, model.head_dim),
        "value": (batch, model.num_kv_heads, seq_len, model.value_head_dim),
    }


def _context_dim(model: Model) -> int:
    """E of a cross-attention layer's context, which only the manifest tells."""
    layer = json.loads(model.manifest or "{}").get("layer") or {}
    return int(layer.get("context_dim") or model.embed_dim)


def _request_bytes(model: Model, seq_len: int, batch: int) -> int:
    if model.kind == "transformer":
        return 8 * batch * seq_len
    itemsize: int = np.dtype(DTYPES[model.dtype]).itemsize
    elements: int = sum(
        math.prod(shape) for shape in _tensor_shapes(model, seq_len, batch).values()
    )
    return elements * itemsize
