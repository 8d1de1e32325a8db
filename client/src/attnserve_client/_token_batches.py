"""Texts, pairs of texts and token ids, as callers give them, to messages."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from attnserve_proto import attention_pb2 as pb

from attnserve_client import _arguments as arguments

_ALLOWED = "a list of texts, of pairs of texts, or of id sequences, or what a tokenizer gives"


def batch(
    name: str, sequences: Any, truncate: bool | None, types: Any = None
) -> pb.TextBatch | pb.TokenBatch:
    """What an argument of `attend_tokens` is on the wire.

    Args:
        name: of the argument.
        sequences: what was given.
        truncate: as there.
        types: a list of integers for each sequence of ids; None: those that `sequences` has.

    Raises:
        TypeError, ValueError: it is none of what is allowed.
    """
    if isinstance(sequences, Mapping):  # of transformers: a BatchEncoding
        sequences, encoded = _encoding(name, sequences)
        if types is not None and encoded is not None:
            raise ValueError(f"token_type_ids: given, and in {name}; allowed: one of the two")
        types = encoded if types is None else types
    items = arguments.items(name, sequences, _ALLOWED)
    if not items:
        raise arguments.refused(name, sequences, f"{_ALLOWED}: at least one")
    if any(isinstance(item, bytes | bytearray) for item in items):
        raise arguments.mistyped(name, sequences, f"{_ALLOWED}; texts are str, not bytes")
    kinds = {_kind(item) for item in items}
    if len(kinds) > 1:
        raise TypeError(f"{name}: {', '.join(sorted(kinds))} cannot be mixed")
    if kinds == {_IDS}:
        return _ids(name, items, types)
    if types is not None:
        raise ValueError(f"token_type_ids: given with {min(kinds)}; allowed: with id sequences")
    if kinds == {_TEXTS}:
        texts = [arguments.text(f"{name}[{row}]", item) for row, item in enumerate(items)]
        return pb.TextBatch(texts=texts, truncate=truncate)
    if name != "inputs":
        raise arguments.mistyped(name, sequences, "single texts, or id sequences")
    both = [
        [arguments.text(f"{name}[{row}][{at}]", text) for row, text in enumerate(side)]
        for at, side in enumerate(zip(*items, strict=True))
    ]
    return pb.TextBatch(texts=both[0], pairs=both[1], truncate=truncate)


_TEXTS, _PAIRS, _IDS = "texts", "pairs", "id sequences"


def _kind(item: Any) -> str:
    if isinstance(item, str):
        return _TEXTS
    pair = isinstance(item, tuple | list) and len(item) == 2
    return _PAIRS if pair and all(isinstance(part, str) for part in item) else _IDS


def _ids(name: str, items: Sequence[Any], types: Any) -> pb.TokenBatch:
    rows = [
        arguments.integers(f"{name}[{row}]", item, 0, arguments.INT64)
        for row, item in enumerate(items)
    ]
    if types is None:
        return pb.TokenBatch(sequences=[pb.TokenSequence(ids=ids) for ids in rows])
    allowed = f"a list of integers for each of the {len(rows)} sequences of {name}"
    given = arguments.items("token_type_ids", types, allowed)
    if len(given) != len(rows):
        raise arguments.refused("token_type_ids", types, allowed)
    sequences = []
    for row, (ids, item) in enumerate(zip(rows, given, strict=True)):
        own = arguments.integers(f"token_type_ids[{row}]", item, 0, arguments.INT64)
        if len(own) != len(ids):
            raise ValueError(
                f"token_type_ids[{row}]: {len(own)} numbers for {len(ids)} ids; allowed: equal"
            )
        sequences.append(pb.TokenSequence(ids=ids, token_type_ids=own))
    return pb.TokenBatch(sequences=sequences)


def _encoding(name: str, encoding: Mapping[str, Any]) -> tuple[list[Any], list[Any] | None]:
    """The ids of what a tokenizer gives, and what kinds of token they are, without padding.

    Kinds that are all 0 are left out: tokenizers give them for models that take none.
    """
    if "input_ids" not in encoding:
        raise ValueError(f"{name}: given a mapping of {sorted(encoding)}; allowed: input_ids in it")
    ids = _rows(encoding["input_ids"])
    kept = [[True] * len(row) for row in ids]
    if encoding.get("attention_mask") is not None:
        kept = _kept(name, _beside(name, "attention_mask", encoding["attention_mask"], ids))
    types = None
    if encoding.get("token_type_ids") is not None:
        types = _masked(_beside(name, "token_type_ids", encoding["token_type_ids"], ids), kept)
        types = types if any(map(any, types)) else None
    return _masked(ids, kept), types


def _kept(name: str, mask: list[Any]) -> list[list[bool]]:
    """Which ids are tokens: those in the middle of a text cannot be left out as padding is."""
    kept = []
    for row, numbers in enumerate(mask):
        real = [bool(number) for number in numbers]
        if not any(real):
            raise ValueError(
                f"{name}: attention_mask[{row}] given without ones; allowed: one or more"
            )
        first, count = real.index(True), sum(real)
        for position, number in enumerate(numbers):
            if number != (first <= position < first + count):
                raise arguments.refused(
                    f"{name}: attention_mask[{row}, {position}]",
                    int(number),
                    "ones for tokens, side by side, and zeros for padding on the left or right",
                )
        kept.append(real)
    return kept


def _beside(name: str, beside: str, given: Any, ids: list[Any]) -> list[Any]:
    rows = _rows(given)
    if [len(row) for row in rows] != [len(row) for row in ids]:
        raise ValueError(f"{name}: {beside} is not as long as input_ids; allowed: equal")
    return rows


def _rows(given: Any) -> list[Any]:
    """Sequences; the numbers of one text are one sequence."""
    rows = list(given)
    return [rows] if rows and not np.ndim(rows[0]) else rows


def _masked(rows: list[Any], kept: list[Any]) -> list[list[Any]]:
    return [
        [number for number, seen in zip(row, sees, strict=True) if seen]
        for row, sees in zip(rows, kept, strict=True)
    ]
