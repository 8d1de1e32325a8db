"""The tokenizer of a checkpoint, as `AutoTokenizer` makes it of all its files.

`tokenizer_config.json`, `special_tokens_map.json` and the class that they name may say otherwise
than `tokenizer.json`. So it is not that file which is served, but what transformers has made of it;
and it is compared with transformers on texts that the two might read differently.
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnserve_proto.manifest import Texts

from attnserve_export.checkpoints.files import read_json
from attnserve_export.checkpoints.sentences import Sentences

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"

# Longer than any: what transformers says where there is no end.
_NO_END = 10**9

# Spaces, cases, accents, signs, other scripts, control characters, and what no vocabulary has.
_PROBES = (
    "The animal didn't cross the street because it was too tired.",
    "  Two spaces\tand a tab \n\n and lines  ",
    "ÀÉÎÕÜ àéîõü Straße İstanbul ŒUVRE ﬁn e\u0301",
    "你好、世界 こんにちは 안녕하세요 Привет مرحبا שלום नमस्ते",
    "1,234.5 50% $9 a_b-c/d\\e @f #g (h) [i] {j} <k> «l» “m”…",
    "zero\u200bwidth \u00a0no-break \ufeffmark 👍🏽 👨‍👩‍👧 \x07bell",
    "Aa" * 90,
    "",
)


class TextError(Exception):
    """A checkpoint's texts cannot be taken; the message says why."""


@dataclass(frozen=True)
class TextReader:
    """How texts become tokens.

    Attributes:
        file: content of the `tokenizer.json` to serve: without truncation and padding, which are
            the server's to decide.
        texts: for the manifest.
        types_unknown: whether no file says if the tokenizer gives `token_type_ids`.
    """

    file: bytes
    texts: Texts
    types_unknown: bool


def text_reader(folder: Path, config: Any, sentences: Sentences | None) -> TextReader | None:
    """How the texts of a checkpoint become tokens; None: it has no tokenizer.

    Args:
        folder: of the transformer itself.
        config: of it, as transformers reads it.
        sentences: what sentence-transformers' files say.

    Raises:
        ExportError: a file cannot be read.
        TextError: there is one that cannot be served.
    """
    options = {} if sentences is None else sentences.tokenizer_options
    found = _tokenizer(folder, config, options)
    if found is None:
        return None
    tokenizer, as_it_is = found
    backend = _backend(tokenizer)
    if sentences is not None and sentences.lowercase:
        _lowercase(backend)
    content = json.loads(backend.to_str())
    content["truncation"] = content["padding"] = None
    texts = Texts(
        max_len=_max_len(tokenizer, config, sentences),
        cut=sentences is not None,
        side=str(tokenizer.truncation_side),
        prompt="" if sentences is None else sentences.prompt,
        prompt_pooled=sentences is None or sentences.prompt_pooled,
        split_special=bool(getattr(tokenizer, "split_special_tokens", False)),
        types="token_type_ids" in tokenizer.model_input_names,
    )
    reader = TextReader(json.dumps(content, ensure_ascii=False).encode(), texts, as_it_is)
    _compare(tokenizer, reader)
    return reader


def _tokenizer(folder: Path, config: Any, options: Mapping[str, Any]) -> tuple[Any, bool] | None:
    """As transformers makes it, and whether tokenizer.json alone decides; None: there is none."""
    from transformers import AutoTokenizer

    # Nothing beside it says otherwise: it is what decides.
    alone = (folder / FILE).is_file() and not (folder / CONFIG).is_file() and not options
    try:
        made = AutoTokenizer.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # transformers raises many kinds
        if alone:
            return _as_it_is(folder), True
        if not any((folder / name).is_file() for name in (FILE, CONFIG)):
            return None
        raise TextError(f"transformers cannot read its tokenizer: {_first_line(error)}") from None
    names = {FILE, *getattr(made, "vocab_files_names", {}).values()}
    if not any((folder / name).is_file() for name in names):
        return None  # transformers makes one of a few tokens out of nothing
    if alone and _algorithm(json.loads(_backend(made).to_str())) != _algorithm(
        read_json(folder / FILE)
    ):
        # It was taken for what models of its kind usually have.
        return _as_it_is(folder), True
    return made, False


def _as_it_is(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    try:
        made: Any = PreTrainedTokenizerFast  # untyped
        return made(tokenizer_file=str(folder / FILE))
    except Exception as error:  # tokenizers raises plain ones
        raise TextError(f"{FILE} cannot be read: {_first_line(error)}") from None


def _algorithm(content: Any) -> str:
    """Of a tokenizer.json: WordPiece, BPE, Unigram or WordLevel."""
    model = content.get("model") or {}
    if "type" in model:
        return str(model["type"])
    # Older files leave it to be found out.
    return "BPE" if "merges" in model else "Unigram" if "unk_id" in model else "WordPiece"


def _backend(tokenizer: Any) -> Any:
    """What computes in Rust, of which there is a file; made anew for classes in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return backend
    from transformers.convert_slow_tokenizer import convert_slow_tokenizer

    try:
        return convert_slow_tokenizer(tokenizer)
    except Exception:  # whatever a converter may raise
        raise TextError(
            f"its tokenizer is a {type(tokenizer).__name__}, which runs in Python alone"
        ) from None


def _lowercase(backend: Any) -> None:
    """Lowercase texts first, as sentence-transformers does."""
    from tokenizers import normalizers

    there: Any = backend.normalizer
    several: Any = normalizers.Sequence  # typed as if nothing could be read of it
    parts = list(there) if isinstance(there, several) else [there]
    if not any(isinstance(part, normalizers.Lowercase) for part in parts):
        kept = [part for part in parts if part is not None]
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *kept])


def _max_len(tokenizer: Any, config: Any, sentences: Sentences | None) -> int | None:
    """Tokens that a text is cut to."""
    given = None if sentences is None else sentences.max_len
    if given is not None:
        return given
    most = int(min(tokenizer.model_max_length, _NO_END))
    positions = getattr(config, "max_position_embeddings", None)
    if sentences is not None and type(positions) is int and positions > 0:
        most = min(most, positions)
    return most if 0 < most < _NO_END else None


def _compare(tokenizer: Any, reader: TextReader) -> None:
    """See that what is served reads texts, and pairs of them, as transformers does.

    Raises:
        TextError: it does not; says of which text.
    """
    from tokenizers import Tokenizer

    served = Tokenizer.from_str(reader.file.decode())
    served.encode_special_tokens = reader.texts.split_special
    special = " ".join(map(str, tokenizer.all_special_tokens))
    probes = [*_PROBES, f"{special} between them {special}"]
    pairs: list[tuple[str, str | None]] = [(first, None) for first in probes]
    pairs += [(first, second) for first, second in itertools.pairwise(probes) if second]
    for first, second in pairs:
        found = served.encode(first) if second is None else served.encode(first, second)
        try:
            expected = tokenizer(first, second, verbose=False)
        except Exception as error:  # whatever a class of its own may raise
            raise TextError(f"its tokenizer does not take texts: {_first_line(error)}") from None
        types = expected.get("token_type_ids", found.type_ids)
        if (found.ids, found.type_ids) != (expected["input_ids"], types):
            given = first if second is None else f"{first} | {second}"
            raise TextError(
                f"its tokenizer is a {type(tokenizer).__name__}, which does more than "
                f"tokenizer.json can say: they differ on {given!r}"
            )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
