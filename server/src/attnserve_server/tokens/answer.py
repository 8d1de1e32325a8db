"""The answer to a token request."""

import time

from attnserve_proto import attention_pb2 as pb
from attnserve_proto.manifest import ModelInput

from attnserve_server.messages import input_message, tensor_message
from attnserve_server.tokens.run import Run
from attnserve_server.tokens.work import TensorBatch, TokensWork


def tokens_response(work: TokensWork, run: Run) -> pb.AttendTokensResponse:
    """What came of a request, as its message."""
    response = pb.AttendTokensResponse(
        model=work.model.manifest.name,
        version=str(work.model.manifest.version),
        variant=work.variant.name,
    )
    heads, tokenizer = work.wanted.heads, work.model.tokenizer
    if heads is not None:
        response.attention = heads.attention.name
        response.layers.extend(heads.layers)
        response.heads.extend(heads.heads)
    source = work.source
    places = []
    if isinstance(source, TensorBatch):
        response.source.CopyFrom(input_message(source.entry))
        places = _places(source.entry)
    for row, output in enumerate(run.outputs):
        sequence = response.sequences.add(
            ids=source.sequences[row],
            truncated=source.truncated[row],
            tokens=places,
            length=source.lengths[row],
        )
        if work.source.types is not None:
            sequence.token_type_ids.extend(work.source.types[row])
        if work.target is not None:
            sequence.target_ids.extend(work.target.sequences[row])
            sequence.target_truncated = work.target.truncated[row]
        if tokenizer is not None:
            sequence.tokens.extend(map(tokenizer.token, sequence.ids))
            sequence.target_tokens.extend(map(tokenizer.token, sequence.target_ids))
        for name, array in output.arrays.items():
            getattr(sequence, name).CopyFrom(tensor_message(array))
    response.timings.CopyFrom(_timings(run))
    return response


def _places(entry: ModelInput) -> list[str]:
    """What the tokens of a picture are called; nothing, of other sources."""
    patches = entry.patches
    if patches is None:
        return []
    first = ["[CLS]", *(f"[REG{number}]" for number in range(1, patches.first))]
    rows, columns = range(patches.rows), range(patches.columns)
    return first[: patches.first] + [f"{row},{column}" for row in rows for column in columns]


def _timings(run: Run) -> pb.Timings:
    """Spans of wall time that add up to the request's time in the server until now."""
    now = time.monotonic()  # the data plane's clock
    return pb.Timings(
        deserialize=_microseconds(run.validated - run.arrived),
        queue=_microseconds(run.started - run.validated),
        compute=_microseconds(run.ended - run.started),
        serialize=_microseconds(now - run.ended),
        batch_size=run.together,
    )


def _microseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e6))
