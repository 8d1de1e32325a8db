"""Checks of `AttendTokensRequest`."""

from collections.abc import Sequence

from attnserve_proto import attention_pb2 as pb

from attnserve_server import dtypes
from attnserve_server.engine.memory import working_bytes
from attnserve_server.engine.models import LoadedModel, ModelStore, Variant
from attnserve_server.engine.work import TokensWanted, TokensWork
from attnserve_server.errors import ExhaustedError, InvalidRequestError, PreconditionError
from attnserve_server.repository.manifest import Transformer
from attnserve_server.settings import Limits
from attnserve_server.validation.sizes import priority


def tokens_work(message: pb.AttendTokensRequest, store: ModelStore, limits: Limits) -> TokensWork:
    """Check a token request, and tokenize its texts.

    Raises:
        RequestError: with the field, what was given and what is allowed.
    """
    if not message.model:
        raise InvalidRequestError.of("model", "nothing", "a name that ListModels gives")
    model = store.get(message.model, message.version)
    transformer = model.manifest.transformer
    if transformer is None:
        raise PreconditionError(
            f"model: {message.model} is a {model.manifest.kind} and takes tensors; use Attend"
        )
    wanted = _wanted(message.returns, model, transformer)
    max_len = min(transformer.max_seq_len or limits.max_seq_len, limits.max_seq_len)
    if message.WhichOneof("input") is None:
        raise InvalidRequestError.of("input", "nothing", "text or tokens")
    if message.HasField("text"):
        _check_batch("text.texts", len(message.text.texts), limits)
        sequences, truncated = _encode(message.text, model, max_len)
    else:
        _check_batch("tokens.sequences", len(message.tokens.sequences), limits)
        sequences = [list(sequence.ids) for sequence in message.tokens.sequences]
        truncated = [False] * len(sequences)
        _check_ids(sequences, transformer)
    field = "text.texts" if message.HasField("text") else "tokens.sequences"
    for row, sequence in enumerate(sequences):
        if not 1 <= len(sequence) <= max_len:
            raise InvalidRequestError.of(
                f"{field}[{row}]", f"{len(sequence)} tokens", f"1..{max_len} tokens"
            )
    outputs = ["weights_0"] if wanted.weights or wanted.entropy else []
    longest = max(len(sequence) for sequence in sequences)
    variant = model.choose(message.variant, (), outputs, longest)
    working = _check_sizes(sequences, wanted, model, variant, limits)
    return TokensWork(
        model, variant, sequences, truncated, wanted, working, priority(message.priority)
    )


def _check_batch(field: str, count: int, limits: Limits) -> None:
    if not 1 <= count <= limits.max_batch:
        raise InvalidRequestError.of(field, f"{count} sequences", f"1..{limits.max_batch}")


def _encode(
    batch: pb.TextBatch, model: LoadedModel, max_len: int
) -> tuple[list[list[int]], list[bool]]:
    if model.tokenizer is None:
        raise PreconditionError(
            f"text: model {model.manifest.name} has no tokenizer; allowed: tokens"
        )
    cut_at = max_len if batch.truncate else None
    encoded = [model.tokenizer.encode(text, cut_at) for text in batch.texts]
    return [ids for ids, _ in encoded], [cut for _, cut in encoded]


def _check_ids(sequences: Sequence[Sequence[int]], transformer: Transformer) -> None:
    for row, sequence in enumerate(sequences):
        for position, token_id in enumerate(sequence):
            if not 0 <= token_id < transformer.vocab_size:
                raise InvalidRequestError.of(
                    f"tokens.sequences[{row}].ids[{position}]",
                    token_id,
                    f"0..{transformer.vocab_size - 1}, the vocabulary",
                )


def _wanted(
    returns: pb.TokenReturnOptions, model: LoadedModel, transformer: Transformer
) -> TokensWanted:
    if returns.pooled and transformer.pooling is None:
        raise PreconditionError(
            f"returns.pooled: checkpoint {model.manifest.name} says nothing about pooling"
        )
    return TokensWanted(
        hidden=not returns.no_hidden,
        pooled=returns.pooled,
        weights=returns.weights,
        entropy=returns.entropy,
        layers=_chosen("returns.layers", returns.layers, transformer.num_layers),
        heads=_chosen("returns.heads", returns.heads, model.manifest.attention.num_heads),
    )


def _chosen(field: str, given: Sequence[int], count: int) -> list[int]:
    for index, number in enumerate(given):
        if number >= count:
            raise InvalidRequestError.of(f"{field}[{index}]", number, f"0..{count - 1}")
    if len(set(given)) != len(given):
        raise InvalidRequestError.of(field, list(given), "each number once")
    return list(given) or list(range(count))


def _check_sizes(
    sequences: Sequence[Sequence[int]],
    wanted: TokensWanted,
    model: LoadedModel,
    variant: Variant,
    limits: Limits,
) -> int:
    """The estimated memory that the work takes while it runs."""
    transformer = model.manifest.transformer
    assert transformer is not None
    item = dtypes.item_bytes(dtypes.number_of(model.manifest.dtype)) or 4
    batch, longest = len(sequences), max(len(sequence) for sequence in sequences)
    num_heads = model.manifest.attention.num_heads
    needed = working_bytes(variant.entry, batch, num_heads, longest, longest, 0)
    if wanted.weights or wanted.entropy:
        needed += len(wanted.layers) * batch * num_heads * longest * longest * item
    # The widest of a block's intermediate results is about four times the hidden states.
    needed += 8 * batch * longest * transformer.hidden_size * 4
    if needed > limits.max_working_bytes:
        raise ExhaustedError(
            f"sequences: {batch} padded to {longest} tokens would take about {needed} bytes of "
            f"working memory; allowed: {limits.max_working_bytes} (--max-working-mib)"
        )
    response = 0
    for sequence in sequences:
        length = len(sequence)
        if wanted.hidden:
            response += length * transformer.hidden_size * item
        if wanted.weights:
            response += len(wanted.layers) * len(wanted.heads) * length * length * item
    allowed = min(limits.max_message_bytes, limits.max_response_bytes)
    if response > allowed:
        raise ExhaustedError(
            f"response size: its tensors would take {response} bytes; allowed: {allowed} "
            "(--max-message-mib); ask for fewer layers, heads or sequences"
        )
    return needed
