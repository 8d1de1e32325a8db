"""The options that the users add to Locust's command line and to the form of its web UI.

Locust's form sends every value back as text and converts it by the type of the default, so lists
stay text here and are split where they are used.
"""

from argparse import ArgumentTypeError
from dataclasses import dataclass
from typing import Any

from attnserve_proto.commands import Access, CommandError, access_of, add_access, values

from attnserve_loadtest import parsing
from attnserve_loadtest.errors import LoadTestError
from attnserve_loadtest.load.arrivals import Arrivals, read_arrivals

_rate = values.number(0, 1e6)


@dataclass(frozen=True, slots=True)
class UserOptions:
    """What one kind of user sends.

    Attributes:
        target: `host:port` of the server.
        model: the model's name.
        variant: empty lets the server pick.
        seq_lens: lengths, ascending.
        batch: sequences of each request.
        timeout: seconds that a request may take.
        seed: of the random inputs.
        rate: requests a second that are due at each user, answered or not; 0: each user sends the
            next one when it has its answer.
        arrivals: of an open loop.
        access: how the server is reached.
    """

    target: str
    model: str
    variant: str
    seq_lens: tuple[int, ...]
    batch: int
    timeout: float
    seed: int
    rate: float
    arrivals: Arrivals
    access: Access


def add_to_parser(parser: Any) -> None:
    """Add the options; `parser` is Locust's own, which shows them in the web UI too."""
    # Not in a group of argparse: Locust's form shows only what was added to its parser itself.
    add = parser.add_argument
    add(
        "--model",
        type=_name_or_nothing,
        default="causal",
        help="model that AttendUser calls; empty: none",
    )
    add("--variant", type=_name_or_nothing, default="", help="its variant; empty: the server picks")
    add(
        "--seq-lens",
        type=_checked_seq_lens,
        default="64,128,256,512",
        help="sequence lengths that AttendUser sends, e.g. 64,128,256",
    )
    add("--batch", type=parsing.positive_int, default=1, help="sequences a request")
    add(
        "--tokens-model",
        type=_name_or_nothing,
        default="",
        help="model that AttendTokensUser calls; empty: none",
    )
    add(
        "--tokens-variant",
        type=_name_or_nothing,
        default="",
        help="its variant; empty: the server picks",
    )
    add(
        "--tokens-seq-lens",
        type=_checked_seq_lens,
        default="16,32,64,128",
        help="tokens a sequence that AttendTokensUser sends",
    )
    add(
        "--request-timeout",
        type=parsing.seconds,
        default=30.0,
        help="seconds that a request may take",
    )
    add("--seed", type=parsing.count, default=0, help="of the random inputs")
    add(
        "--rate",
        type=_rate,
        default=0.0,
        help="open loop: requests a second that are due at each user, answered or not; 0: each "
        "user waits for its answer",
    )
    add(
        "--arrivals",
        type=_checked_arrivals,
        default="poisson",
        help="of an open loop: poisson, constant or bursts:N",
    )
    # Which files of this machine are read is not for whoever opens the web UI to say.
    add_access(parser.add_argument_group("how the server is reached"))


def attend_options(host: str | None, options: Any) -> UserOptions:
    """What `AttendUser` sends.

    Args:
        host: Locust's host.
        options: Locust's parsed options.

    Raises:
        LoadTestError: one of them cannot be read.
    """
    return _user_options(host, options, options.model, options.variant, options.seq_lens)


def tokens_options(host: str | None, options: Any) -> UserOptions:
    """What `AttendTokensUser` sends; arguments and errors as those of `attend_options`."""
    return _user_options(
        host, options, options.tokens_model, options.tokens_variant, options.tokens_seq_lens
    )


def _user_options(
    host: str | None, options: Any, model: str, variant: str, seq_lens: str
) -> UserOptions:
    if not host:
        raise LoadTestError("no server given: use --host HOST:PORT")
    if not model:
        raise LoadTestError("no model given: use --model (AttendUser), --tokens-model (tokens)")
    try:
        target = parsing.target(host)
        return UserOptions(
            target=target,
            model=model,
            variant=variant,
            seq_lens=parsing.seq_lens(seq_lens),
            batch=parsing.positive_int(str(options.batch)),
            timeout=parsing.seconds(str(options.request_timeout)),
            seed=parsing.count(str(options.seed)),
            rate=_rate(str(options.rate)),
            arrivals=read_arrivals(options.arrivals),
            access=access_of(options, [target]),
        )
    except (ArgumentTypeError, CommandError) as error:
        raise LoadTestError(str(error)) from None


def _checked_seq_lens(text: str) -> str:
    parsing.seq_lens(text)
    return text


def _checked_arrivals(text: str) -> str:
    read_arrivals(text)
    return text


def _name_or_nothing(text: str) -> str:
    return values.name(text) if text else ""
