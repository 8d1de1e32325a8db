"""A batch of sequences whose keys and values are in sessions of a server."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attnserve_client._results import Array, Model
from attnserve_client._sessions import Batch, Session
from attnserve_client._transformers_service import Geometry, Service

_DTYPES = {torch.float32: "FP32", torch.float16: "FP16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's attention over new tokens, as transformers asks for it.

    Letters: B rows, S new tokens of each, padding included.

    Attributes:
        query: [B, H, S, D].
        key, value: [B, Hkv, S, D] and [B, Hkv, S, Dv], of the new tokens alone.
        mask: [B, all tokens so far], true where there is no padding; None: there is none.
        scale: multiplies query x key.
        window: keys up to its own that a query sees; None: as the sequences have it.
        softcap: of the scores; 0: none.
        sinks: [H], a score of each head that takes weight and has no value; None: none.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    window: int | None = None
    softcap: float = 0.0
    sinks: torch.Tensor | None = None

    @property
    def geometry(self) -> Geometry:
        """What a model must have to compute it.

        Raises:
            ValueError: another dtype than those that are served.
        """
        if self.query.dtype not in _DTYPES:
            allowed = ", ".join(map(str, _DTYPES))
            raise ValueError(f"query: {self.query.dtype}; allowed: {allowed}")
        return Geometry(
            self.query.shape[1],
            self.key.shape[1],
            self.query.shape[3],
            self.value.shape[3],
            _DTYPES[self.query.dtype],
            self.softcap,
        )


@dataclass(frozen=True, slots=True)
class _Step:
    """One pass of new tokens through the layers.

    Attributes:
        mask: [B, tokens so far and new ones], bool.
        new: [B, S] bool: new tokens that are no padding; None: all.
        counts: of them in each row that has any.
        batch: of the sessions of these rows; None: no row has any.
    """

    mask: torch.Tensor
    new: torch.Tensor | None
    counts: list[int]
    batch: Batch | None

    def pack(self, rows: torch.Tensor) -> Array:
        """[B, heads, S, dim] to [T, heads, dim], without the padding."""
        each = rows.detach().cpu().transpose(1, 2)
        return _array(each.flatten(0, 1) if self.new is None else each[self.new])

    def unpack(self, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """[T, heads, dim] to [B, S, heads, dim]; zeros at the padding. Device is as `like`'s."""
        count, _, length, _ = like.shape
        if self.new is None:
            return rows.reshape(count, length, *rows.shape[1:]).to(like.device)
        whole = rows.new_zeros(count, length, *rows.shape[1:])
        whole[self.new] = rows
        return whole.to(like.device)


class Sequences:
    """Rows of a batch. Each has a session that holds its tokens, without the padding.

    Sessions are opened with the first tokens, as only then all is known that they must be.

    Args:
        service: where.
        windows: of each layer: keys up to its own that a query sees; 0: all.

    Attributes:
        sessions: of each row. Always the same list.
    """

    def __init__(self, service: Service, windows: Sequence[int]) -> None:
        self.service = service
        self.windows = tuple(windows)
        self.sessions: list[Session] = []
        self._mask = torch.ones(0, 0, dtype=torch.bool)
        self._model: Model | None = None
        self._geometry: Geometry | None = None
        self._step: _Step | None = None

    @property
    def length(self) -> int:
        """Tokens of a row, padding included."""
        return self._mask.shape[1]

    def attend(self, layer: int, asked: Attention) -> torch.Tensor:
        """Compute one layer; layers come one after another, from 0 on, and the last ends the step.

        Returns:
            [B, S, H, Dv]; zeros at the padding.

        Raises:
            AttnserveError: the server refused it; the tokens are not there then, and can be given
                again from layer 0 on.
            ValueError: the attention cannot be had, or is not what the layers before were.
        """
        if layer == 0:
            self._begin(asked)
        step = self._step
        if step is None or self._model is None:
            raise RuntimeError(f"layer {layer} without layer 0; allowed: each layer, in order")
        self._check(layer, asked)
        output = self._compute(layer, asked, step, self._model)
        if layer == len(self.windows) - 1:
            self._mask = step.mask
            self._step = None
        return output

    def _compute(self, layer: int, asked: Attention, step: _Step, model: Model) -> torch.Tensor:
        if step.batch is None:
            count, heads, length, _ = asked.query.shape
            return asked.query.new_zeros(count, length, heads, asked.value.shape[3])
        query = asked.query
        if not math.isclose(asked.scale, model.scale, rel_tol=1e-6):
            query = query * (asked.scale / model.scale)
        result = step.batch.attend(
            layer,
            step.pack(query),
            step.pack(asked.key),
            step.pack(asked.value),
            new_tokens=step.counts,
            return_log_sum_exp=asked.sinks is not None,
        )
        assert result.output is not None
        output = _tensor(result.output)
        if asked.sinks is not None:
            assert result.log_sum_exp is not None
            # The sink's share of the weights is taken off: exp(l) / (exp(l) + exp(sink)).
            sinks = asked.sinks.detach().float().cpu()
            kept = torch.sigmoid(torch.from_numpy(result.log_sum_exp) - sinks)
            output = (output * kept.unsqueeze(-1)).to(output.dtype)
        return step.unpack(output, asked.query)

    def _begin(self, asked: Attention) -> None:
        if self._step is not None and self._step.batch is not None:
            self._step.batch.abandon()  # it failed halfway
        self._step = None
        count, _, added, _ = asked.query.shape
        mask = self._checked_mask(asked, count, added)
        new = mask[:, self.length :]
        counts = new.sum(1).tolist()
        if not self.sessions:
            self._geometry = asked.geometry
            self._model = self.service.find(self._geometry, asked.scale)
            self.sessions += self.service.open(self._model, self.windows, count, max(counts))
            self._mask = mask[:, : self.length].clone()
        active = [session for session, tokens in zip(self.sessions, counts, strict=True) if tokens]
        self._step = _Step(
            mask,
            None if bool(new.all()) else new,
            [tokens for tokens in counts if tokens],
            self.service.client.batch(active) if active else None,
        )

    def _checked_mask(self, asked: Attention, count: int, added: int) -> torch.Tensor:
        if self.sessions and len(self.sessions) != count:
            raise ValueError(f"a batch of {count}; allowed: {len(self.sessions)}, as in the cache")
        shape = (count, self.length + added)
        if asked.mask is None:
            mask = torch.ones(shape, dtype=torch.bool)
        elif tuple(asked.mask.shape) == shape:
            mask = asked.mask.to("cpu", torch.bool)
        else:
            raise ValueError(
                f"attention_mask: {list(asked.mask.shape)}; allowed: {list(shape)}, with 0 at the "
                "padding and 1 elsewhere"
            )
        if self.sessions and not torch.equal(mask[:, : self.length], self._mask):
            raise ValueError(
                "attention_mask: not as before where tokens are in the cache; allowed: what it was"
            )
        if any(self.windows) and bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            raise ValueError(
                "attention_mask: padding after a token, in a model with a window; allowed: at the "
                "left alone, as windows count the padding"
            )
        return mask

    def _check(self, layer: int, asked: Attention) -> None:
        if asked.geometry != self._geometry:
            raise ValueError(
                f"layer {layer}: {asked.geometry}; allowed: as in layer 0, {self._geometry}"
            )
        if asked.window is not None and asked.window != self.windows[layer]:
            raise ValueError(
                f"layer {layer}: window {asked.window}; allowed: {self.windows[layer]}, as the "
                "model's configuration says"
            )

    def select(self, rows: Sequence[int]) -> None:
        """Make row i what row rows[i] is; each may occur any number of times. None is in a step."""
        if not self.sessions:
            return
        left = set(rows)
        # Room first: what nobody takes over is closed before others are forked.
        for row, session in enumerate(self.sessions):
            if row not in left:
                session.close()
        selected = []
        for row in rows:
            session = self.sessions[row]
            if row in left:
                left.remove(row)  # the first one takes it over
                selected.append(session)
            else:
                selected.append(session.fork(reserved_tokens=session.reserved_tokens))
        self.sessions[:] = selected
        self._mask = self._mask[torch.tensor(rows, dtype=torch.long)]

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens of each row, padding included."""
        if count == 0 or not self.sessions:
            return
        kept = max(self.length - count, 0)
        removed = self._mask[:, kept:].sum(1).tolist()
        for session, tokens in zip(self.sessions, removed, strict=True):
            if tokens:
                session.truncate(session.length - tokens)
        self._mask = self._mask[:, :kept]

    def fork(self) -> "Sequences":
        """Others that begin with these tokens."""
        other = Sequences(self.service, self.windows)
        other._mask, other._model, other._geometry = self._mask, self._model, self._geometry
        other.sessions += [
            session.fork(reserved_tokens=session.reserved_tokens) for session in self.sessions
        ]
        return other

    def close(self) -> None:
        """Close the sessions; other ones are opened when tokens come."""
        self._step = None
        for session in self.sessions:
            session.close()
        self.sessions.clear()
        self._mask = torch.ones(0, 0, dtype=torch.bool)


def _array(tensor: torch.Tensor) -> Array:
    tensor = tensor.contiguous()
    if tensor.dtype != torch.bfloat16:
        array: Array = tensor.numpy()
        return array
    import ml_dtypes

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _tensor(array: "np.ndarray[Any, Any]") -> torch.Tensor:
    if array.dtype.name != "bfloat16":
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
