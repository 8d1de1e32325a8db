"""Text to token ids, by the tokenizer that belongs to a checkpoint."""

from pathlib import Path

from tokenizers import Tokenizer


class TextTokenizer:
    """A `tokenizer.json`; adds the special tokens of its model. Safe to share between threads."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special = self._tokenizer.num_special_tokens_to_add(is_pair=False)

    def encode(self, text: str, max_len: int | None) -> tuple[list[int], bool]:
        """Token ids of a text, special tokens included.

        Args:
            text: any text.
            max_len: cut to this many ids, keeping the special tokens; None: never cut.

        Returns:
            The ids, and whether any were cut.
        """
        encoding = self._tokenizer.encode(text)
        if max_len is None or len(encoding.ids) <= max_len:
            return list(encoding.ids), False
        bare = self._tokenizer.encode(text, add_special_tokens=False)
        bare.truncate(max_len - self._special)
        return list(self._tokenizer.post_process(bare).ids), True

    def token(self, token_id: int) -> str:
        """The vocabulary's text of an id; empty if it has none."""
        return self._tokenizer.id_to_token(token_id) or ""
