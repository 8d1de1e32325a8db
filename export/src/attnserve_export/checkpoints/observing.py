"""A model is run before it is exported, to see how its attention is called and with what."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnserve_export.checkpoints import masks
from attnserve_export.checkpoints.masks import Reach
from attnserve_export.checkpoints.plans import (
    CROSS,
    DECODER,
    ENCODER,
    ENCODER_DECODER,
    IDS,
    STATES,
    STATES_DECODER,
    Convention,
    Plan,
    Source,
    argument_of,
)
from attnserve_export.checkpoints.sources import source_of, with_places
from attnserve_export.checkpoints.tracing import Call, being
from attnserve_export.errors import ExportError

# All different, so that none is mistaken for another.
_BATCH, _SOURCE, _TARGET, _OTHER_TARGET = 2, 11, 14, 15

_STATES_MASK = argument_of(STATES_DECODER, "attention_mask")


@dataclass
class _Watcher:
    """Attention computed plainly, and what it was given."""

    masks: masks.SeenMasks
    calls: list[Call]

    def attend(self, call: Call, value: Tensor) -> Tensor:
        """[B, H, Sq, Dv]; nobody looks at the numbers."""
        reach = self.masks.reach(call.mask)
        seen = Call(
            call.query,
            call.key,
            call.scale,
            reach,
            call.mask,
            call.bias,
            call.softcap,
            call.sinks,
        )
        self.calls.append(seen)
        _, num_heads, query_len, _ = call.query.shape
        if num_heads % value.shape[1]:
            raise ExportError(
                f"--checkpoint: attention of {num_heads} query heads over {value.shape[1]} heads "
                "of keys; allowed: a multiple"
            )
        mean = value.mean(dim=2, keepdim=True).repeat_interleave(num_heads // value.shape[1], dim=1)
        return mean.expand(-1, -1, query_len, -1)


def observe(
    model: nn.Module, config: Any, *, takes: str, two_stacks: bool, vocab_size: int
) -> list[Plan]:
    """Run a model once on a few tokens, or on what it takes in their place.

    Args:
        model: loaded with `tracing.IMPLEMENTATION`.
        config: of it.
        takes: what it reads: the argument's name.
        two_stacks: whether it is an encoder-decoder.
        vocab_size: of the ids to draw.

    Returns:
        Plans that differ in their convention, the one that makes the plainest graph first.

    Raises:
        ExportError: it cannot be run, or does not call its attention as it should.
    """
    taken = inspect.signature(model.forward).parameters
    source = source_of(model, config, takes)
    has_target = two_stacks or takes == STATES
    padding = getattr(config.get_text_config(), "pad_token_id", None)
    tables: list[int] = []
    for target in (_TARGET, _OTHER_TARGET):
        sizes, tables = _Sizes(_SOURCE, target), []
        # States that are given have places already.
        placed = source.ragged and takes != STATES
        looked_for = ((_SOURCE,) if placed else ()) + ((target,) if has_target else ())
        feeds = _feeds(source, taken, has_target, target, vocab_size, padding)
        watched = _run(model, feeds, looked_for, tables)
        if not watched:
            raise ExportError("--checkpoint: its attention does not go through AttentionInterface")
        if not source.ragged:
            sizes = _Sizes(watched[0].query.shape[2], target)
        if sizes.source != target:
            break
    if not source.ragged:
        source = replace(source, tokens=sizes.source)
        source = with_places(
            source, model, lambda given: _run(model, {takes: given, **_start(two_stacks)})[0].query
        )
    calls = tuple((_whose(call, has_target, sizes), call) for call in watched)
    kind = STATES_DECODER if takes == STATES else _kind(watched, two_stacks, sizes)
    if kind == STATES_DECODER and not any(name == CROSS for name, _ in calls):
        raise ExportError("--checkpoint: its attention to the states that it is given is not seen")
    if not has_target:
        calls = tuple((kind, call) for _, call in calls)
    names = list(dict.fromkeys(name for name, _ in calls))
    by_name = {name: [call for own, call in calls if own == name] for name in names}
    described = {name: _described(name, own) for name, own in by_name.items()}
    for name in names:
        if has_target and not described[name]:
            raise ExportError(
                f"--checkpoint: a decoder beside an encoder, whose {name} attention has a "
                "softcap or a mask of its own, or heads that differ from layer to layer"
            )
        if len({call.query.shape[1] for call in by_name[name]}) > 1:
            raise ExportError("--checkpoint: its layers have different numbers of heads")
    biased = frozenset(n for n, own in by_name.items() if n != CROSS and own[0].bias is not None)
    text = config.get_text_config()
    named = "max_position_embeddings" if source.ragged else "max_target_positions"
    positions = getattr(text, named, None)
    longest = min(tables) if tables else (positions if isinstance(positions, int) else 0)
    return [
        Plan(
            kind,
            convention,
            tuple((name, call.reach) for name, call in calls),
            described,
            biased,
            max(0, longest),
            bool(tables),
            _token_types(text, taken, two_stacks) if source.name == IDS else 0,
            source,
        )
        for convention in _conventions(kind, taken, source)
    ]


@dataclass(frozen=True)
class _Sizes:
    """Tokens of the source and of the target."""

    source: int
    target: int


def _feeds(
    source: Source,
    taken: Any,
    has_target: bool,
    target: int,
    vocab_size: int,
    padding: int | None,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> Tensor:
        made = torch.randint(0, vocab_size, (_BATCH, length), generator=generator)
        if padding is None:
            return made
        # Some models leave padding out of their positions, which are looked for here.
        return torch.where(made == padding, (made + 1) % vocab_size, made)

    if source.name == IDS:
        feeds = {IDS: ids(_SOURCE)}
    else:
        sizes = [_SOURCE if isinstance(size, str) else size for size in source.shape]
        feeds = {source.name: torch.randn((_BATCH, *sizes), generator=generator)}
    if has_target:
        own = argument_of(STATES_DECODER if source.name == STATES else "", "decoder_input_ids")
        feeds[own] = ids(target)
    for name in list(feeds):
        beside = name.replace("input_ids", "attention_mask").replace(STATES, _STATES_MASK)
        if beside != name and beside in taken:
            feeds[beside] = torch.ones(feeds[name].shape[:2], dtype=torch.int64)
    return feeds


def _start(two_stacks: bool) -> dict[str, Tensor]:
    """The shortest target; none for a model that takes none."""
    return {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.int64)} if two_stacks else {}


def _run(
    model: nn.Module,
    feeds: dict[str, Tensor],
    lengths: tuple[int, ...] = (),
    tables: list[int] | None = None,
) -> list[Call]:
    """What a model gives to its attention, call by call; adds to `tables` the room of those that
    the places of sequences of these lengths are looked up in.
    """
    taken = inspect.signature(model.forward).parameters
    with masks.watching() as made, _position_tables([] if tables is None else tables, lengths):
        watcher = _Watcher(made, [])
        with being(watcher), torch.no_grad():
            more: dict[str, Any] = {"use_cache": False} if "use_cache" in taken else {}
            rows = max(len(each) for each in feeds.values())
            model(**{n: each.expand(rows, *each.shape[1:]) for n, each in feeds.items()}, **more)
    return watcher.calls


def _token_types(config: Any, taken: Any, two_stacks: bool) -> int:
    """How many kinds of token there are: of one alone nothing need be said."""
    types = getattr(config, "type_vocab_size", None)
    if two_stacks or "token_type_ids" not in taken or type(types) is not int or types < 2:
        return 0
    return types


def _whose(call: Call, has_target: bool, sizes: _Sizes) -> str:
    if not has_target:
        return ENCODER
    source, target = sizes.source, sizes.target
    attended = (call.query.shape[2], call.key.shape[2])
    known = {(source, source): ENCODER, (target, target): DECODER, (target, source): CROSS}
    if attended not in known:
        raise ExportError(
            f"--checkpoint: a decoder beside an encoder, of {source} and {target} tokens, attends "
            f"from {attended[0]} to {attended[1]}; allowed: its source, its target, or one to the "
            "other"
        )
    return known[attended]


def _kind(calls: Sequence[Call], two_stacks: bool, sizes: _Sizes) -> str:
    if two_stacks:
        return ENCODER_DECODER
    for call in calls:
        if (call.query.shape[2], call.key.shape[2]) != (sizes.source, sizes.source):
            raise ExportError(
                f"--checkpoint: of {sizes.source} tokens it attends from {call.query.shape[2]} to "
                f"{call.key.shape[2]}; allowed: from all to all"
            )
    return DECODER if all(_causal(call) for call in calls) else ENCODER


def _causal(call: Call) -> bool:
    if call.reach is not None:
        return call.reach.causal
    mask = call.mask
    assert mask is not None
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    later = torch.ones(visible.shape[-2:], dtype=torch.bool).triu(1)
    return not bool((visible & later).any())


def _described(name: str, calls: Sequence[Call]) -> bool:
    """Whether a manifest can say how weights are made of query and key."""
    first = calls[0]
    for call in calls:
        wanted = Reach(None, 0) if name == DECODER else masks.EVERYTHING
        windowed = name == DECODER and call.reach is not None and call.reach.causal
        if call.reach != wanted and not windowed:
            return False
        if call.softcap or call.key.shape[1] != first.key.shape[1]:
            return False
        if name != CROSS and not _same_bias(call.bias, first.bias):
            return False
    return first.bias is None or name == CROSS or _by_distance(first.bias)


def _same_bias(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or (one.shape == other.shape and torch.equal(one, other))


def _by_distance(bias: Tensor) -> bool:
    """Whether a bias [1, H, S, S] says the same of all that are as far apart."""
    return bias.shape[0] == 1 and torch.equal(bias[..., 1:, 1:], bias[..., :-1, :-1])


def _conventions(kind: str, taken: Any, source: Source) -> list[Convention]:
    no_cache = "use_cache" in taken
    if not source.ragged and kind != ENCODER_DECODER:
        return [Convention(False, False, no_cache)]  # there is nothing to say
    pairs = [(False, True), (False, False), (True, False), (True, True)]
    if kind not in (DECODER, STATES_DECODER):
        pairs = [(False, False), (True, False), (False, True), (True, True)]
    return [
        Convention(mask, positions, no_cache)
        for mask, positions in pairs
        if (not mask or "attention_mask" in taken or not source.ragged)
        and (not positions or ("position_ids" in taken and kind != ENCODER_DECODER))
    ]


class _position_tables:  # noqa: N801 (a context manager)
    """Finds the longest sequences that tables of positions have room for."""

    def __init__(self, found: list[int], sizes: tuple[int, ...]) -> None:
        self._found, self._sizes = found, sizes

    def __enter__(self) -> None:
        original = nn.functional.embedding
        self._original = original

        def looking(given: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            rows = given.reshape(-1, given.shape[-1]) if given.ndim else given.reshape(1, 1)
            if rows.shape[1] in self._sizes:
                places = torch.arange(rows.shape[1])
                if torch.equal(rows - rows[:, :1], places.expand_as(rows)) and bool(
                    (rows[:, 0] == rows[0, 0]).all()
                ):
                    self._found.append(weight.shape[0] - int(rows[0, 0]))
            return original(given, weight, *args, **kwargs)

        nn.functional.embedding = looking  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        nn.functional.embedding = self._original
