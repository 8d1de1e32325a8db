"""Checks of `AttendTokensRequest`."""

from collections.abc import Sequence
from dataclasses import replace

from attnserve_proto import attention_pb2 as pb
from attnserve_proto.manifest import Transformer

from attnserve_server import dtypes
from attnserve_server.errors import ExhaustedError, InvalidRequestError, PreconditionError
from attnserve_server.models.store import LoadedModel, ModelStore
from attnserve_server.settings import Limits
from attnserve_server.tokens import texts
from attnserve_server.tokens.bounds import check_batch, check_ids, check_lengths, max_len
from attnserve_server.tokens.run import needed_outputs
from attnserve_server.tokens.tensors import tensor_batch
from attnserve_server.tokens.work import (
    HeadsWanted,
    TensorBatch,
    TokenBatch,
    TokensWanted,
    TokensWork,
)

HIGH, NORMAL, LOW = 1, 2, 3


# What is said of attention is FP32, whatever the model's dtype.
_WEIGHT_BYTES = 4


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
    wanted = tokens_wanted(message.returns, model, transformer, limits)
    source = _source(message, model, transformer, limits)
    target = _target(message, model, transformer, limits, len(source.lengths))
    return complete(
        model,
        source,
        target,
        wanted,
        variant=message.variant,
        priority=message.priority,
        limits=limits,
    )


def complete(
    model: LoadedModel,
    source: TokenBatch | TensorBatch,
    target: TokenBatch | None,
    wanted: TokensWanted,
    *,
    variant: str,
    priority: int,
    limits: Limits,
) -> TokensWork:
    """What is to run, of sequences and wishes that have been checked each by itself.

    Args:
        model: a transformer.
        source, target, wanted: as `TokensWork` has them.
        variant: asked for; empty: the server picks.
        priority: asked for; 0: normal.
        limits: of the server.

    Raises:
        RequestError: no variant can do it, it is too large, or there is no such priority.
    """
    transformer = model.manifest.transformer
    assert transformer is not None
    given = {name for each in model.variants for name in each.outputs}
    longest = max(batch.longest for batch in (source, target) if batch is not None)
    outputs = needed_outputs(wanted, transformer, given)
    taken = [source.entry.name if isinstance(source, TensorBatch) else "input_ids"]
    chosen = model.variant(model.core.choose(variant, taken, outputs, longest))
    work = TokensWork(model, chosen, source, target, wanted, _priority(priority))
    return replace(work, working_bytes=_check_sizes(work, transformer, limits))


def tokens_wanted(
    returns: pb.TokenReturnOptions, model: LoadedModel, transformer: Transformer, limits: Limits
) -> TokensWanted:
    """Check what is to be returned.

    Raises:
        RequestError: with the field, what was given and what is allowed.
    """
    if returns.pooled and transformer.pooling is None:
        said = transformer.pooling_refused
        reason = f": {said}" if said else " says nothing about pooling"
        raise PreconditionError(f"returns.pooled: checkpoint {model.manifest.name}{reason}")
    names = [attention.name for attention in transformer.attentions]
    if returns.attention not in ("", *names):
        raise InvalidRequestError.of("returns.attention", returns.attention, ", ".join(names))
    for field in ("mass_by_distance", "mass_on_first"):
        number = getattr(returns, field)
        if number > limits.max_seq_len:
            raise InvalidRequestError.of(f"returns.{field}", number, f"0..{limits.max_seq_len}")
    attention = transformer.attention(returns.attention or names[0])
    heads = HeadsWanted(
        attention=attention,
        layers=_chosen("returns.layers", returns.layers, len(attention.layers)),
        heads=_chosen("returns.heads", returns.heads, attention.num_heads),
        weights=returns.weights,
        entropy=returns.entropy,
        effective_context=returns.effective_context,
        mass_by_distance=returns.mass_by_distance,
        mass_on_first=returns.mass_on_first,
    )
    return TokensWanted(
        hidden=not returns.no_hidden,
        pooled=returns.pooled,
        heads=heads if heads.names else None,
    )


def _priority(given: int) -> int:
    """0 is NORMAL."""
    if given > LOW:
        raise InvalidRequestError.of(
            "priority", given, f"{HIGH} (high), {NORMAL} (normal), {LOW} (low), 0 (normal)"
        )
    return given or NORMAL


def _source(
    message: pb.AttendTokensRequest, model: LoadedModel, transformer: Transformer, limits: Limits
) -> TokenBatch | TensorBatch:
    kind, names = message.WhichOneof("input"), [entry.name for entry in transformer.inputs]
    if message.tensors:
        if kind is not None:
            raise InvalidRequestError.of("input", f"{kind} and tensors", "one of the two")
        return tensor_batch(message.tensors, model, transformer, limits)
    if not transformer.takes_ids:
        raise PreconditionError(
            f"{kind or 'input'}: model {model.manifest.name} reads no token ids; allowed: tensors: "
            f"{', '.join(names)}"
        )
    if kind is None:
        also = f", or tensors: {', '.join(names)}" if names else ""
        raise InvalidRequestError.of("input", "nothing", f"text or tokens{also}")
    if kind == "text":
        check_batch("text.texts", len(message.text.texts), limits)
        return texts.encoded("text", message.text, model, limits)
    check_batch("tokens.sequences", len(message.tokens.sequences), limits)
    return _given("tokens", message.tokens, model, transformer, limits)


def _target(
    message: pb.AttendTokensRequest,
    model: LoadedModel,
    transformer: Transformer,
    limits: Limits,
    count: int,
) -> TokenBatch | None:
    """What the decoder reads; None for a model that has no decoder besides its encoder."""
    kind = message.WhichOneof("target")
    start = transformer.decoder_start_token_id
    if start is None:
        if kind is not None:
            raise PreconditionError(
                f"{kind}: model {model.manifest.name} is no encoder-decoder and takes no target"
            )
        return None
    if kind is None:
        return TokenBatch([[start]] * count, [False] * count)
    if kind == "target_text":
        _check_targets("target_text.texts", len(message.target_text.texts), count)
        return texts.encoded("target_text", message.target_text, model, limits, start)
    _check_targets("target_tokens.sequences", len(message.target_tokens.sequences), count)
    target = _given("target_tokens", message.target_tokens, model, transformer, limits)
    if target.types is not None:
        raise InvalidRequestError.of(
            "target_tokens.sequences", "token_type_ids", "none: decoders take no such ids"
        )
    return target


def _check_targets(field: str, count: int, expected: int) -> None:
    if count != expected:
        raise InvalidRequestError.of(
            field, f"{count} sequences", f"{expected}, one for each sequence of the input"
        )


def _given(
    field: str,
    batch: pb.TokenBatch,
    model: LoadedModel,
    transformer: Transformer,
    limits: Limits,
) -> TokenBatch:
    sequences = [list(sequence.ids) for sequence in batch.sequences]
    check_ids(f"{field}.sequences", "ids", sequences, transformer.vocab_size, "the vocabulary")
    check_lengths(f"{field}.sequences", sequences, max_len(transformer, limits))
    types = [
        list(sequence.token_type_ids) or [0] * len(sequence.ids) for sequence in batch.sequences
    ]
    return TokenBatch(
        sequences, [False] * len(sequences), _checked_types(field, types, sequences, model)
    )


def _checked_types(
    field: str,
    types: Sequence[Sequence[int]],
    sequences: Sequence[Sequence[int]],
    model: LoadedModel,
) -> Sequence[Sequence[int]] | None:
    """Kinds of tokens; None: all are 0."""
    transformer = model.manifest.transformer
    assert transformer is not None
    for row, (own, ids) in enumerate(zip(types, sequences, strict=True)):
        if len(own) != len(ids):
            raise InvalidRequestError.of(
                f"{field}.sequences[{row}].token_type_ids",
                f"{len(own)} numbers",
                f"{len(ids)}, one for each id, or none",
            )
    if not any(map(any, types)):
        return None
    if not transformer.token_types:
        raise PreconditionError(
            f"{field}.sequences: model {model.manifest.name} takes no token_type_ids; "
            "allowed: none, or 0 for each id"
        )
    check_ids(
        f"{field}.sequences", "token_type_ids", types, transformer.token_types, "its token types"
    )
    return types


def _chosen(field: str, given: Sequence[int], count: int) -> list[int]:
    for index, number in enumerate(given):
        if number >= count:
            raise InvalidRequestError.of(f"{field}[{index}]", number, f"0..{count - 1}")
    if len(set(given)) != len(given):
        raise InvalidRequestError.of(field, list(given), "each number once")
    return list(given) or list(range(count))


def _check_sizes(work: TokensWork, transformer: Transformer, limits: Limits) -> int:
    """The memory that the work will take while it runs, estimated.

    Raises:
        ExhaustedError: that, or the answer, is more than is allowed.
    """
    wanted, model = work.wanted, work.model
    item = dtypes.item_bytes(dtypes.number_of(model.manifest.dtype)) or 4
    batches = [batch for batch in (work.source, work.target) if batch is not None]
    count, longest = work.count, max(batch.longest for batch in batches)
    num_heads = max(attention.num_heads for attention in transformer.attentions)
    response = sum(
        _response_bytes(wanted, transformer, source, target, item)
        for source, target in zip(
            work.source.lengths, (work.target or work.source).lengths, strict=True
        )
    )
    needed = response + model.core.working_bytes(
        work.variant.name, count, num_heads, longest, longest, 0
    )
    if wanted.heads is not None and "weights_0" in work.variant.outputs:
        needed += len(wanted.heads.layers) * count * num_heads * longest * longest * _WEIGHT_BYTES
    # The widest of a block's intermediate results is about four times the hidden states. Query and
    # key of all layers are kept until the run ends.
    kept = sum(
        len(attention.layers) * (attention.num_heads + attention.num_kv_heads) * attention.head_dim
        for attention in transformer.attentions
    )
    needed += count * longest * (8 * transformer.hidden_size + kept) * 4
    if needed > limits.max_working_bytes:
        raise ExhaustedError(
            f"sequences: {count} padded to {longest} tokens would take about {needed} bytes of "
            f"working memory; allowed: {limits.max_working_bytes} (--max-working-mib)"
        )
    allowed = min(limits.max_message_bytes, limits.max_response_bytes)
    if response > allowed:
        raise ExhaustedError(
            f"response size: its tensors would take {response} bytes; allowed: {allowed} "
            "(--max-message-mib); ask for fewer layers, heads or sequences"
        )
    return needed


def _response_bytes(
    wanted: TokensWanted, transformer: Transformer, source_len: int, target_len: int, item: int
) -> int:
    """Of the tensors of one sequence."""
    size = 0
    if wanted.hidden:
        size += target_len * transformer.hidden_size * item
        encoded = source_len * transformer.hidden_size * item
        size += encoded if transformer.has_two_stacks else 0
    heads = wanted.heads
    if heads is None:
        return size
    query_len = source_len if heads.attention.name == "encoder" else target_len
    key_len = target_len if heads.attention.name == "decoder" else source_len
    by_query = heads.entropy + heads.effective_context + bool(heads.mass_on_first)
    each = query_len * (by_query + heads.weights * key_len) + heads.mass_by_distance
    return size + len(heads.layers) * len(heads.heads) * each * _WEIGHT_BYTES
