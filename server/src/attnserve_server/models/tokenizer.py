"""Text to token ids, by the tokenizer that belongs to a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attnserve_proto.manifest import Texts
from tokenizers import Tokenizer


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text, or a pair of texts, as tokens.

    Attributes:
        ids: special tokens included.
        types: of each id what kind it is.
        length: ids that there would be, were none left out.
    """

    ids: list[int]
    types: list[int]
    length: int

    @property
    def cut(self) -> bool:
        """Whether any were left out."""
        return self.length > len(self.ids)


class TextTokenizer:
    """A `tokenizer.json`; adds the special tokens of its model. Safe to share between threads.

    Attributes:
        prompt_len: ids before each text that are not its own, as long as none are cut.
    """

    def __init__(self, path: Path, texts: Texts) -> None:
        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = texts.split_special
        self._texts = texts
        self.prompt_len = self._prompt_len() if texts.prompt else 0

    def encode(self, text: str, pair: str | None, max_len: int, *, prompted: bool) -> Encoded:
        """Token ids of a text, or of two as one sequence.

        Args:
            text: any text.
            pair: the second one; None: there is none.
            max_len: cut to this many ids, keeping the special tokens: of a pair, the longer text
                until both are as long.
            prompted: whether the checkpoint's prompt comes first.
        """
        text = self._texts.prompt + text if prompted else text
        encoding = self._tokenizer.encode(text, pair)
        ids, types = list(encoding.ids), list(encoding.type_ids)
        if len(ids) <= max_len:
            return Encoded(ids, types, len(ids))
        kept = self._kept(encoding.sequence_ids, max_len)
        return Encoded([ids[at] for at in kept], [types[at] for at in kept], len(ids))

    def beginning(self, text: str, characters: int) -> str:
        """What stays of a text, of which at most so many characters may: its end, if texts are cut
        at their beginning."""
        if len(text) <= characters:
            return text
        return text[:characters] if self._texts.side == "right" else text[-characters:]

    def token(self, token_id: int) -> str:
        """The vocabulary's text of an id; empty if it has none."""
        return self._tokenizer.id_to_token(token_id) or ""

    def _kept(self, sequence_ids: Sequence[int | None], max_len: int) -> list[int]:
        """Which tokens stay: the special ones, which belong to no text, and some of each text."""
        kept, first, second = (
            [at for at, own in enumerate(sequence_ids) if own == text] for text in (None, 0, 1)
        )
        sizes = _longest_first(len(first), len(second), max(0, max_len - len(kept)))
        for places, size in zip((first, second), sizes, strict=True):
            kept += places[:size] if self._texts.side == "right" else places[len(places) - size :]
        return sorted(kept)

    def _prompt_len(self) -> int:
        """Tokens of the prompt with those before it, without one that ends a sequence."""
        ids = self._tokenizer.encode(self._texts.prompt).ids
        added = self._tokenizer.get_added_tokens_decoder()
        ended = bool(ids) and ids[-1] in added and added[ids[-1]].special
        return len(ids) - ended


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of two texts that are cut to some tokens together, as `tokenizers` cuts them."""
    shorter = min(first, second)
    longer = max(shorter, room - shorter)
    if shorter + longer > room:
        shorter = room // 2
        longer = room - shorter
    return (longer, shorter) if first > second else (shorter, longer)
