"""`ModelInfer` for token models: turned into the work that `AttendTokens` would give."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from attnserve_proto import attention_pb2 as pb
from attnserve_proto.inference import open_inference_pb2 as oip

from attnserve_server import dtypes
from attnserve_server.dtypes import Array
from attnserve_server.errors import InvalidRequestError, PreconditionError
from attnserve_server.models import ports
from attnserve_server.models.store import LoadedModel
from attnserve_server.oip.tensors import InputTensor, Output, check_answer_size, value
from attnserve_server.settings import Limits
from attnserve_server.tokens.bounds import max_len
from attnserve_server.tokens.checks import complete, tokens_wanted
from attnserve_server.tokens.work import SequenceOutput, TokenBatch, TokensWork

_MOST = 2**32 - 1
_LONGEST_TIMEOUT = 2**63 - 1
_LAYER = "weights_"


@dataclass(frozen=True, slots=True)
class Options:
    """The parameters of a request.

    Attributes:
        scale, softcap: None: the model's own.
        top_k, mass_by_distance: 0: not given.
        variant: empty: the server picks.
        priority: 1 high, 2 normal, 3 low; 0: normal.
        timeout: microseconds that it may wait and run; 0: for ever.
    """

    scale: float | None = None
    softcap: float | None = None
    top_k: int = 0
    mass_by_distance: int = 0
    variant: str = ""
    priority: int = 0
    timeout: int = 0


@dataclass(frozen=True, slots=True)
class TokensCall:
    """What is to run, and how the answer is padded.

    Attributes:
        work: the sequences without their padding.
        layers: whose weights are wanted.
        padded_len: S of the request.
        firsts: where in its row each sequence's first token is.
    """

    work: TokensWork
    layers: Sequence[int]
    padded_len: int
    firsts: Sequence[int]


def options(message: oip.ModelInferRequest) -> Options:
    """The parameters of a request.

    Raises:
        InvalidRequestError: a value is out of range.
    """
    known: dict[str, float | int | str] = {}
    for name, parameter in message.parameters.items():
        given = value(parameter)
        if name in ("scale", "softcap"):
            if isinstance(given, bool) or not isinstance(given, int | float):
                raise _wrong(name, given, "a number, as double_param or int64_param")
            known[name] = float(given)
        elif name == "variant":
            if not isinstance(given, str):
                raise _wrong(name, given, "a name, as string_param")
            known[name] = given
        elif name in _INTEGERS:
            if type(given) is not int or not 0 <= given <= _INTEGERS[name]:
                raise _wrong(name, given, f"0..{_INTEGERS[name]}, as int64_param")
            known[name] = given
        # Others are ignored, as Triton does: clients send what other servers know.
    return Options(**known)  # type: ignore[arg-type]


def tokens_call(
    model: LoadedModel,
    tensors: Mapping[str, InputTensor],
    asked: Sequence[Output],
    given: Options,
    limits: Limits,
) -> TokensCall:
    """The work that a request to a transformer is.

    Raises:
        InvalidRequestError: a tensor is not as the model takes it, or there is none such.
        PreconditionError: the model is an encoder-decoder, or reads no token ids.
        ExhaustedError: it, or its padded answer, would be too large.
    """
    transformer = model.manifest.transformer
    assert transformer is not None
    if transformer.has_target:
        raise PreconditionError(
            f"model_name: {model.manifest.name} has a decoder that attends to a source, which this "
            "protocol does not serve; use AttendTokens"
        )
    if not transformer.takes_ids:
        raise PreconditionError(
            f"model_name: {model.manifest.name} reads {transformer.inputs[0].name}, which this "
            "protocol does not serve; use AttendTokens"
        )
    for name in ("scale", "softcap", "top_k", "mass_by_distance"):
        if getattr(given, name):
            raise _wrong(name, getattr(given, name), "nothing for transformer models")
    ids, types, places = _sequences(model, tensors, limits)
    names = {output.name for output in asked}
    there = {port.name for port in ports.outputs(model)}
    if not names <= there:
        raise _no_output(model, min(names - there))
    layers = sorted(int(name.removeprefix(_LAYER)) for name in names if name.startswith(_LAYER))
    returns = pb.TokenReturnOptions(
        no_hidden="last_hidden_state" not in names,
        pooled="pooled" in names,
        weights=bool(layers),
        layers=layers,
    )
    padded_len = ids.shape[1]
    item = dtypes.item_bytes(dtypes.number_of(model.manifest.dtype)) or 4
    size = ids.size * item * transformer.hidden_size if "last_hidden_state" in names else 0
    rows = ids.size * transformer.attentions[0].num_heads
    size += rows * padded_len * 4 * len(layers)  # weights are FP32
    check_answer_size(size, min(limits.max_message_bytes, limits.max_response_bytes))
    work = complete(
        model,
        TokenBatch(
            [row[place].tolist() for row, place in zip(ids, places, strict=True)],
            [False] * len(ids),
            [row[place].tolist() for row, place in zip(types, places, strict=True)]
            if types.any()
            else None,
        ),
        None,
        tokens_wanted(returns, model, transformer, limits),
        variant=given.variant,
        priority=given.priority,
        limits=limits,
    )
    return TokensCall(work, layers, padded_len, [place.start for place in places])


def padded(call: TokensCall, sequences: Sequence[SequenceOutput]) -> dict[str, Array]:
    """The answer to a token request as the protocol has it, 0 where there is padding.

    Returns:
        last_hidden_state [B, S, E], pooled [B, E], weights_<layer> [B, H, S, S]; what was wanted.
    """
    arrays: dict[str, Array] = {}
    batch, most = len(sequences), call.padded_len
    for row, (sequence, first) in enumerate(zip(sequences, call.firsts, strict=True)):
        own = sequence.arrays
        if "hidden" in own:
            length, width = own["hidden"].shape
            hidden = arrays.setdefault(
                "last_hidden_state", np.zeros((batch, most, width), own["hidden"].dtype)
            )
            hidden[row, first : first + length] = own["hidden"]
        if "weights" in own:
            _, heads, length, _ = own["weights"].shape
            tokens = slice(first, first + length)
            for layer, weights in zip(call.layers, own["weights"], strict=True):
                all_weights = arrays.setdefault(
                    f"{_LAYER}{layer}", np.zeros((batch, heads, most, most), weights.dtype)
                )
                all_weights[row, :, tokens, tokens] = weights
    if sequences and "pooled" in sequences[0].arrays:
        arrays["pooled"] = np.stack([sequence.arrays["pooled"] for sequence in sequences])
    return arrays


def _sequences(
    model: LoadedModel, tensors: Mapping[str, InputTensor], limits: Limits
) -> tuple[Array, Array, list[slice]]:
    """Ids [B, S], what kind of token each is, and where in each row the tokens are."""
    transformer = model.manifest.transformer
    assert transformer is not None
    allowed = {port.name for port in ports.inputs(model)}
    for name in tensors:
        if name not in allowed:
            raise _no_input(model, name)
    if "input_ids" not in tensors:
        raise InvalidRequestError.of("input_ids", "nothing", "[B, S] INT64")
    ids = _integers(tensors["input_ids"])
    batch, padded_len = ids.shape
    most = max_len(transformer, limits)
    if batch > limits.max_batch or padded_len > most:
        raise InvalidRequestError.of(
            "input_ids.shape", list(ids.shape), f"up to [{limits.max_batch}, {most}]"
        )
    real, types = np.ones(ids.shape, bool), np.zeros_like(ids)
    if "attention_mask" in tensors:
        real = _checked_mask(_beside(ids, tensors["attention_mask"]))
    _check(ids, real, "input_ids", transformer.vocab_size, "the vocabulary")
    if "token_type_ids" in tensors:
        types = _beside(ids, tensors["token_type_ids"])
        _check(types, real, "token_type_ids", transformer.token_types, "its token types")
    firsts, lengths = real.argmax(axis=1), real.sum(axis=1)
    places = [
        slice(int(first), int(first + length))
        for first, length in zip(firsts, lengths, strict=True)
    ]
    return ids, types, places


def _beside(ids: Array, tensor: InputTensor) -> Array:
    """Integers [B, S], one for each id."""
    numbers = _integers(tensor)
    if numbers.shape != ids.shape:
        raise InvalidRequestError.of(
            f"{tensor.name}.shape", list(numbers.shape), f"{list(ids.shape)}, as input_ids has"
        )
    return numbers


def _check(numbers: Array, real: Array, name: str, count: int, what: str) -> None:
    """See that those which are of tokens are from 0 to `count` - 1."""
    wrong = real & ((numbers < 0) | (numbers >= count))
    if wrong.any():
        row, position = (int(index) for index in np.argwhere(wrong)[0])
        raise InvalidRequestError.of(
            f"{name}[{row}, {position}]", int(numbers[row, position]), f"0..{count - 1}, {what}"
        )


def _checked_mask(mask: Array) -> Array:
    """Which ids are tokens: in each row ones side by side, and zeros before or after them."""
    lengths = (mask != 0).sum(axis=1)
    if not lengths.all():
        row = int(lengths.argmin())
        raise InvalidRequestError.of(f"attention_mask[{row}]", "no ones", "at least one token")
    after_first = np.arange(mask.shape[1]) - (mask != 0).argmax(axis=1)[:, None]
    real: Array = (after_first >= 0) & (after_first < lengths[:, None])
    wrong = mask != real
    if wrong.any():
        row, position = (int(index) for index in np.argwhere(wrong)[0])
        raise InvalidRequestError.of(
            f"attention_mask[{row}, {position}]",
            int(mask[row, position]),
            "ones for tokens, side by side, and zeros for padding on the left or right",
        )
    return real


def _integers(tensor: InputTensor) -> Array:
    """A copy of [B, S] INT64."""
    name, shape = tensor.name, tensor.shape
    if tensor.dtype != pb.INT64:
        raise InvalidRequestError.of(f"{name}.datatype", dtypes.name_of(tensor.dtype), "INT64")
    if len(shape) != 2 or min(shape) < 1:
        raise InvalidRequestError.of(f"{name}.shape", list(shape), "[B, S], each at least 1")
    wanted = math.prod(shape) * 8
    if tensor.elements.nbytes != wanted:
        raise InvalidRequestError.of(
            name, f"{tensor.elements.nbytes} bytes", f"{wanted} bytes, as shape {list(shape)} takes"
        )
    return np.frombuffer(bytes(tensor.elements), "<i8").reshape(shape)


def _wrong(name: str, given: object, allowed: str) -> InvalidRequestError:
    return InvalidRequestError.of(f"parameters[{name!r}]", repr(given), allowed)


def _no_input(model: LoadedModel, name: str) -> InvalidRequestError:
    allowed = ", ".join(port.name for port in ports.inputs(model))
    return InvalidRequestError.of("inputs", repr(name[:80]), f"{allowed} for {model.manifest.name}")


def _no_output(model: LoadedModel, name: str) -> InvalidRequestError:
    allowed = ", ".join(port.name for port in ports.outputs(model))
    return InvalidRequestError.of(
        "outputs", repr(name[:80]), f"{allowed} for {model.manifest.name}"
    )


_INTEGERS = {
    "top_k": _MOST,
    "mass_by_distance": _MOST,
    "priority": 3,
    "timeout": _LONGEST_TIMEOUT,
}
