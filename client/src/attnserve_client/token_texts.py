"""Token texts as they can be shown: nothing invisible, nothing that turns the text around it."""

import codecs
import re
import unicodedata
from collections.abc import Sequence
from itertools import groupby

from attnserve_client._results import TokensResult

# Whole names of tokens that models add around a text. They tend to be sinks: places for weight
# that a head has no better use for.
_SPECIAL = frozenset(
    ("[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]", "<s>", "</s>", "<pad>", "<mask>", "<unk>",
     "<bos>", "<eos>", "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
)  # fmt: skip
_SEPARATORS = frozenset(("[SEP]", "</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>"))
_REGISTER = re.compile(r"\[REG\d+\]")  # tokens of a picture that stand for no place in it
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")

# Byte-level BPE (GPT-2) writes each byte as a character: those that can be seen as themselves, the
# others as the characters from U+0100 on.
_SEEN = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_BYTES = {chr(byte): byte for byte in _SEEN}
_BYTES |= {
    chr(0x100 + place): byte
    for place, byte in enumerate(byte for byte in range(256) if byte not in _SEEN)
}
# SentencePiece writes a byte that is no piece like this, and a space as ▁.
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE_PIECE = "▁"


def axes_of(
    result: TokensResult, sequence: int, attention: str = ""
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tokens that the Sq and the Sk axis of a sequence's weights stand for.

    Args:
        result: of `attend_tokens`.
        sequence: which one of the batch.
        attention: which one of the model's; empty: that of the result.

    Returns:
        Queries and keys, as the vocabulary writes them; ids where the model has no tokenizer, and
        positions where tokens have no ids.
    """
    attention = attention or result.attention
    source = _names(result.tokens, result.ids, sequence)
    if not source and sequence < len(result.lengths):
        source = tuple(map(str, range(result.lengths[sequence])))
    target = _names(result.target_tokens, result.target_ids, sequence)
    # Only the results of encoder-decoders have a target.
    queries = target if target and attention in ("decoder", "cross") else source
    keys = target if target and attention == "decoder" else source
    return queries, keys


def shown(tokens: Sequence[str]) -> list[str]:
    """The tokens of a sequence as `displayable` shows them.

    Tokens of byte-level BPE are turned back into text: a space before a word is ␣, and a byte that
    is but part of a character <0xC3>.
    """
    if not _are_bytes(tokens):
        return list(map(displayable, tokens))
    return [displayable(each) if is_special(each) else _of_bytes(each) for each in tokens]


def text_of(tokens: Sequence[str]) -> str:
    """The text that tokens spell, without those that the model added.

    Exact for byte-level BPE. Other vocabularies do not say all about spaces: of WordPiece, those
    around punctuation are where they usually are.
    """
    said = [token for token in tokens if not is_special(token)]
    if not said:
        return " ".join(tokens)
    if _are_bytes(tokens):
        return bytes(_BYTES[each] for token in said for each in token).decode("utf-8", "replace")
    if any(token.startswith(_SPACE_PIECE) for token in said):
        pieces = (bytes.fromhex(_BYTE_PIECE.sub(r"\1", token)) if _BYTE_PIECE.fullmatch(token)
                  else token.replace(_SPACE_PIECE, " ").encode("utf-8", "surrogatepass")
                  for token in said)  # fmt: skip
        return b"".join(pieces).decode("utf-8", "replace").strip()
    text = " ".join(said).replace(" ##", "")
    text = re.sub(r"(\w) (['\u2019]) (\w)", r"\1\2\3", text)
    text = re.sub(r"(\w) - (?=\w)", r"\1-", text)
    text = re.sub(r" ([,.;:!?)\]}%])", r"\1", text)
    return re.sub(r"([(\[{]) ", r"\1", text)


def _names(
    tokens: Sequence[Sequence[str]], ids: Sequence[Sequence[int]], sequence: int
) -> tuple[str, ...]:
    """The tokens of a sequence, or its ids where there is no tokenizer; empty if it has neither."""
    for each in (tokens, ids):
        if sequence < len(each) and each[sequence]:
            return tuple(map(str, each[sequence]))
    return ()


def _are_bytes(tokens: Sequence[str]) -> bool:
    """Whether the tokens are of byte-level BPE: then their bytes are UTF-8, and more than ASCII."""
    bytes_found = False
    for special, run in groupby(tokens, is_special):
        said = "".join(run)
        if special:
            continue
        if not all(each in _BYTES for each in said):
            return False
        decoder = codecs.getincrementaldecoder("utf-8")()  # what was truncated may end anywhere
        try:
            text = decoder.decode(bytes(_BYTES[each] for each in said))
        except UnicodeDecodeError:
            return False
        if any(unicodedata.category(each) == "Cc" and each not in "\n\t" for each in text):
            return False
        bytes_found = bytes_found or text != said
    return bytes_found


def _of_bytes(token: str) -> str:
    text = bytes(_BYTES[each] for each in token).decode("utf-8", "surrogateescape")
    word = text.lstrip(" ")
    return "␣" * (len(text) - len(word)) + "".join(map(_visible_byte, word))


def _visible_byte(character: str) -> str:
    code = ord(character)  # 0xDC80 and on are bytes that are no whole character
    return f"<0x{code - 0xDC00:02X}>" if 0xDC80 <= code <= 0xDCFF else _visible(character)


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
    """What is shown of a token, cut to so many characters."""
    text = displayable(token)
    return text if len(text) <= length else text[: length - 1] + "…"


def is_special(token: str) -> bool:
    """Whether a model added the token around the text."""
    return token in _SPECIAL or _REGISTER.fullmatch(token) is not None


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
