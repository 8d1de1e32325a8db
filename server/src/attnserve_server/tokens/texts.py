"""Texts of a token request, and pairs of them, to token ids."""

from attnserve_proto import attention_pb2 as pb
from attnserve_proto.manifest import Transformer

from attnserve_server.errors import InvalidRequestError, PreconditionError
from attnserve_server.models.store import LoadedModel
from attnserve_server.models.tokenizer import Encoded, TextTokenizer
from attnserve_server.settings import Limits
from attnserve_server.tokens.bounds import check_ids, check_lengths, max_len
from attnserve_server.tokens.work import TokenBatch

# Characters of a text for each token that a model takes, at first: of a text that is longer by far
# no more is tokenized than tells that it is too long.
_CHARACTERS_A_TOKEN = 64


def encoded(
    field: str,
    batch: pb.TextBatch,
    model: LoadedModel,
    limits: Limits,
    start: int | None = None,
) -> TokenBatch:
    """Token ids of texts, or of pairs of texts.

    Args:
        field: of the request.
        batch: its content.
        model: a transformer.
        limits: of the server.
        start: for targets: the token to put first; the last one then goes, since a decoder is to
            tell each token from those before it.

    Raises:
        RequestError: the model takes no texts, or not these; says which.
    """
    transformer = model.manifest.transformer
    assert transformer is not None
    tokenizer = model.tokenizer
    if tokenizer is None:
        instead = "tokens" if start is None else "target_tokens"
        raise PreconditionError(
            f"{field}: model {model.manifest.name} has no tokenizer; allowed: {instead}"
        )
    pairs = _pairs(field, batch, is_target=start is not None)
    longest = max_len(transformer, limits)
    most, cut = _cut(batch, transformer, longest, is_source=start is None)
    found = [
        _encode(f"{field}.texts[{row}]", tokenizer, text, pair, most, cut, prompted=start is None)
        for row, (text, pair) in enumerate(zip(batch.texts, pairs, strict=True))
    ]
    sequences = [each.ids if start is None else [start, *each.ids[:-1]] for each in found]
    check_lengths(f"{field}.texts", sequences, most if cut else longest)
    # A tokenizer may know more tokens than its model.
    check_ids(f"{field}.texts", "token", sequences, transformer.vocab_size, "the vocabulary")
    types = None
    if start is None and transformer.texts.types and any(any(each.types) for each in found):
        types = [each.types for each in found]
        _check_types(field, types, model)
    return TokenBatch(
        sequences,
        [each.cut for each in found],
        types,
        0 if transformer.texts.prompt_pooled or start is not None else tokenizer.prompt_len,
    )


def _pairs(field: str, batch: pb.TextBatch, *, is_target: bool) -> list[str | None]:
    """The second text of each; None: it is single."""
    if not batch.pairs:
        return [None] * len(batch.texts)
    if is_target:
        raise InvalidRequestError.of(f"{field}.pairs", f"{len(batch.pairs)} texts", "none")
    if len(batch.pairs) != len(batch.texts):
        raise InvalidRequestError.of(
            f"{field}.pairs",
            f"{len(batch.pairs)} texts",
            f"{len(batch.texts)}, one for each of texts, or none",
        )
    return list(batch.pairs)


def _cut(
    batch: pb.TextBatch, transformer: Transformer, longest: int, *, is_source: bool
) -> tuple[int, bool]:
    """Tokens that a text may have, and whether it is cut to them instead of refused."""
    by_itself = is_source and transformer.texts.cut
    cut = batch.truncate if batch.HasField("truncate") else by_itself
    if cut or by_itself:
        return min(transformer.texts.max_len or longest, longest), cut
    return longest, False


def _encode(
    field: str,
    tokenizer: TextTokenizer,
    text: str,
    pair: str | None,
    most: int,
    cut: bool,
    *,
    prompted: bool,
) -> Encoded:
    """One text, or one pair, as tokens: no longer than `most`.

    Raises:
        InvalidRequestError: it is longer, and may not be cut.
    """
    characters = max(len(text), len(pair or ""))
    looked_at = most * _CHARACTERS_A_TOKEN
    while True:
        found = tokenizer.encode(
            tokenizer.beginning(text, looked_at),
            None if pair is None else tokenizer.beginning(pair, looked_at),
            most,
            prompted=prompted,
        )
        if found.cut and not cut:
            given = f"{found.length} tokens"
            if looked_at < characters:
                given = f"{characters} characters, more than {most} tokens"
            raise InvalidRequestError.of(field, given, f"1..{most} tokens")
        if found.cut or looked_at >= characters:
            return found
        looked_at *= 4  # of few tokens: much white space, or words without end


def _check_types(field: str, types: list[list[int]], model: LoadedModel) -> None:
    transformer = model.manifest.transformer
    assert transformer is not None
    if not transformer.token_types:
        raise PreconditionError(
            f"{field}.pairs: model {model.manifest.name} takes no token_type_ids, by which its "
            "tokenizer tells the texts of a pair apart; allowed: single texts, or a model that was "
            "exported with them"
        )
    check_ids(f"{field}.texts", "token_type_ids", types, transformer.token_types, "its token types")
