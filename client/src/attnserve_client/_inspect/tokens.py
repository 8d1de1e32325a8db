"""Token texts as they can be shown: nothing invisible, nothing that turns the text around it."""

import unicodedata
from collections.abc import Sequence

# Whole names of tokens that models add around a text. They tend to be sinks: places for weight
# that a head has no better use for.
_SPECIAL = frozenset(
    ("[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]", "<s>", "</s>", "<pad>", "<mask>", "<unk>",
     "<bos>", "<eos>", "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
)  # fmt: skip
_SEPARATORS = frozenset(("[SEP]", "</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>"))
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def displayable(token: str) -> str:
    """The token with whatever cannot be seen written out.

    Control characters become their pictures (a line feed is ␊), other invisible characters (zero
    width, direction marks, private use) `<U+200B>`, the empty token `∅`, a token of spaces `␣`s.
    """
    if not token:
        return "∅"
    if token.isspace() and set(token) == {" "}:
        return "␣" * len(token)
    return "".join(map(_visible, token))


def label(token: str, length: int = 14) -> str:
    """`displayable`, cut to so many characters."""
    text = displayable(token)
    return text if len(text) <= length else text[: length - 1] + "…"


def is_special(token: str) -> bool:
    """Whether a model added the token around the text."""
    return token in _SPECIAL


def second_segment(tokens: Sequence[str]) -> int | None:
    """Where the second of two texts begins: behind the first separator with text behind it.

    Args:
        tokens: as the vocabulary writes them.

    Returns:
        A position, or None of a single text.
    """
    for position, token in enumerate(tokens[:-1]):
        rest = tokens[position + 1 :]
        if position and token in _SEPARATORS and not all(map(is_special, rest)):
            return position + 1
    return None


def _visible(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    # The joiner and the variation selector are what holds an emoji together.
    if character == "\u200d":
        return character
    if unicodedata.category(character) in _INVISIBLE:
        return f"<U+{code:04X}>"
    return character
