"""Locust users that call an attnserve server over gRPC; a locustfile imports them by name.

Each request goes to a row of Locust's statistics named `model/variant/seq_len=N`. Its response time
is end to end: from the call of the SDK to its return. A failed request is listed under the name of
its gRPC status. All users of a process share one connection, as grpc's channels would anyway.
"""

from attnserve_loadtest import gevent_grpc  # noqa: F401, I001  (patches; comes first)

import logging
import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, ClassVar

from attnserve_client import AttentionClient, AttnserveError
from gevent.lock import RLock
from locust import User, events, task
from locust.exception import StopTest
from locust.runners import WorkerRunner

from attnserve_loadtest import collector, options, webui
from attnserve_loadtest.errors import LoadTestError
from attnserve_loadtest.options import UserOptions
from attnserve_loadtest.payloads import Payload, check_request, make_payload, row_name
from attnserve_loadtest.samples import CallFailed, Sample, measure

__all__ = ["AttendTokensUser", "AttendUser"]

_log = logging.getLogger(__name__)
_preparing = RLock()
_messages_seen: set[tuple[str, str]] = set()


class AttentionUser(User):  # type: ignore[misc]  (Locust's User is untyped to mypy)
    """A user that sends one request after another, each user's lengths in an order of its own.

    Every user goes through all lengths in a random order, then again in another, so that all
    lengths get equally many requests.
    """

    abstract = True
    read_options: ClassVar[Callable[[str | None, Any], UserOptions]]
    kinds: ClassVar[tuple[str, ...]]

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        try:
            self._options = type(self).read_options(
                environment.host or self.host, environment.parsed_options
            )
            with _preparing:
                self._client = _client(self._options.target)
                self._payloads = _payloads(self._options, self.kinds)
        except (LoadTestError, AttnserveError) as error:
            raise StopTest(f"{type(self).__name__}: {error}") from error
        self._order = _shuffled_for_ever(self._payloads)

    @task
    def send(self) -> None:
        """Send the next request and tell Locust."""
        sample = measure(
            next(self._order),
            self._client,
            variant=self._options.variant,
            timeout=self._options.timeout,
        )
        fire(self.environment, sample, self._options.variant)


class AttendUser(AttentionUser):
    """Sends query, key and value (or a layer's hidden states): `--model`, `--seq-lens`."""

    read_options = staticmethod(options.attend_options)
    kinds = ("core", "layer")


class AttendTokensUser(AttentionUser):
    """Sends token ids: `--tokens-model`, `--tokens-seq-lens`."""

    read_options = staticmethod(options.tokens_options)
    kinds = ("transformer",)


def fire(environment: Any, sample: Sample, variant: str) -> None:
    """Tell Locust of a request; the sample travels to listeners in its context.

    Args:
        environment: Locust's.
        sample: the request.
        variant: the variant asked for; its row if the request failed.
    """
    failure = sample.failure
    if failure and (failure.code, failure.message) not in _messages_seen:
        if len(_messages_seen) < 100:
            _log.warning("%s: %s", failure.code, failure.message)
        _messages_seen.add((failure.code, failure.message))
    environment.events.request.fire(
        request_type=sample.method,
        name=row_name(sample.model, sample.variant or variant, sample.seq_len),
        response_time=sample.end_to_end_us / 1e3,
        response_length=sample.response_bytes,
        response=None,
        exception=CallFailed(failure.code) if failure else None,
        context={"sample": sample},
    )


@cache
def _client(target: str) -> AttentionClient:
    return AttentionClient(target)


@cache
def _payloads(wanted: UserOptions, kinds: tuple[str, ...]) -> tuple[Payload, ...]:
    client = _client(wanted.target)
    model = client.get_model(wanted.model)
    if model.kind not in kinds:
        raise LoadTestError(
            f"model {wanted.model!r} is of kind {model.kind}, this user sends to {' or '.join(kinds)}"
        )
    check_request(
        model,
        client.server_info(),
        variant=wanted.variant,
        seq_lens=wanted.seq_lens,
        batch=wanted.batch,
    )
    return tuple(
        make_payload(model, seq_len, batch=wanted.batch, seed=wanted.seed)
        for seq_len in wanted.seq_lens
    )


def _shuffled_for_ever(payloads: tuple[Payload, ...]) -> Iterator[Payload]:
    while True:
        yield from random.sample(payloads, len(payloads))


def choose_users(environment: Any, model: str, tokens_model: str) -> None:
    """Leave out the users that have no model to call, unless none would be left.

    Args:
        environment: Locust's; its user classes change.
        model: of `AttendUser`; empty: none.
        tokens_model: of `AttendTokensUser`; empty: none.
    """
    idle: set[type] = set()
    if not model:
        idle.add(AttendUser)
    if not tokens_model:
        idle.add(AttendTokensUser)
    every = getattr(environment, "attnserve_user_classes", None) or list(environment.user_classes)
    environment.attnserve_user_classes = every
    environment.user_classes = [each for each in every if each not in idle] or every


@events.init_command_line_parser.add_listener
def _add_options(parser: Any) -> None:
    options.add_to_parser(parser)


@events.init.add_listener
def _install(environment: Any, **_: Any) -> None:
    timings = collector.TimingsCollector(environment)
    if isinstance(environment.runner, WorkerRunner):
        return
    parsed = environment.parsed_options
    if not getattr(parsed, "class_picker", False):
        choose_users(environment, parsed.model, parsed.tokens_model)
    if environment.web_ui:
        webui.install(environment, timings, choose_users)
