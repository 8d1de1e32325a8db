"""Locust users that call an attnserve server over gRPC; a locustfile subclasses them.

Each request goes to a row of Locust's statistics named `model/variant/seq_len=N`. Its response time
is end to end: from the call of the SDK to its return. A failed request is listed under the name of
its gRPC status. All users of a process share one connection, as grpc's channels would anyway.

With `--rate` each user is a source of requests that are due at times of their own, and the response
time counts from then. A process beside Locust's sends them, for gevent wakes up a millisecond late
and grpc's calls in greenlets are slow. The users of several workers are so many sources.
"""

from attnserve_loadtest import gevent_grpc  # noqa: F401, I001  (patches; comes first)

import itertools
import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, ClassVar

from attnserve_client import AttentionClient, AttnserveError
from attnserve_proto.commands import Access
from gevent.lock import RLock
from locust import User, events, task
from locust.exception import StopTest
from locust.runners import WorkerRunner

from attnserve_loadtest import collector, options, webui
from attnserve_loadtest.errors import LoadTestError
from attnserve_loadtest.load.source import Source
from attnserve_loadtest.options import UserOptions
from attnserve_loadtest.payloads import Payload, check_request, make_payload
from attnserve_loadtest.publish import publish
from attnserve_loadtest.samples import measure

__all__ = ["AttendTokensUser", "AttendUser"]

_preparing = RLock()
_users = itertools.count()


class AttentionUser(User):
    """A user that sends one request after another, each user's lengths in an order of its own.

    Every user goes through all lengths in a random order, then again in another, so that all
    lengths get equally many requests.
    """

    abstract = True
    read_options: Callable[[str | None, Any], UserOptions]
    kinds: ClassVar[tuple[str, ...]]

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        try:
            self._options = type(self).read_options(
                environment.host or self.host, environment.parsed_options
            )
            with _preparing:
                self._client = _client(self._options.target, self._options.access)
                self._payloads = _payloads(self._options, self.kinds)
        except (LoadTestError, AttnserveError) as error:
            if getattr(environment.parsed_options, "headless", False):
                environment.process_exit_code = 1
            raise StopTest(f"{type(self).__name__}: {error}") from None
        self._variant = self._options.variant
        self._source: Source | None = None
        self._order = _shuffled_for_ever(self._payloads)

    @task
    def send(self) -> None:
        """Send the next request and tell Locust; in an open loop, tell of what was due."""
        if self._options.rate:
            self._tell_of_source()
            return
        sample = measure(
            next(self._order),
            self._client,
            variant=self._options.variant,
            timeout=self._options.timeout,
        )
        self._variant = sample.variant or self._variant
        publish(self.environment, sample, self._variant)

    def on_stop(self) -> None:
        """End the source, if there is one."""
        if self._source is not None:
            self._source.close()
            self._source = None

    def _tell_of_source(self) -> None:
        if self._source is None:
            self._source = Source(self._options, _number_of_user(self.environment))
        for sample in self._source.samples():
            self._variant = sample.variant or self._variant
            publish(self.environment, sample, self._variant)
        raise StopTest("the process that sends requests has ended: see its message above")


class AttendUser(AttentionUser):
    """Sends query, key and value (or a layer's hidden states): `--model`, `--seq-lens`.

    Abstract, as `AttendTokensUser` is: a locustfile's subclass runs, and this does not run beside
    it merely because it was imported.
    """

    abstract = True
    read_options = staticmethod(options.attend_options)
    kinds = ("core", "layer")


class AttendTokensUser(AttentionUser):
    """Sends token ids: `--tokens-model`, `--tokens-seq-lens`."""

    abstract = True
    read_options = staticmethod(options.tokens_options)
    kinds = ("transformer",)


def _number_of_user(environment: Any) -> int:
    """Another for each user of all workers, so that no two sources are due at the same times."""
    worker = getattr(environment.runner, "worker_index", 0)
    return (max(0, worker) << 20) + next(_users)


@cache
def _client(target: str, access: Access) -> AttentionClient:
    return AttentionClient(target, **access.of_client())


@cache
def _payloads(wanted: UserOptions, kinds: tuple[str, ...]) -> tuple[Payload, ...]:
    client = _client(wanted.target, wanted.access)
    model = client.get_model(wanted.model)
    if model.kind not in kinds:
        raise LoadTestError(
            f"model {wanted.model!r} is a {model.kind} model; "
            f"this user calls {' and '.join(kinds)} models"
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
    idle = tuple(
        kind for kind, name in ((AttendUser, model), (AttendTokensUser, tokens_model)) if not name
    )
    every = getattr(environment, "attnserve_user_classes", None) or list(environment.user_classes)
    environment.attnserve_user_classes = every
    environment.user_classes = [each for each in every if not issubclass(each, idle)] or every


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _add_options(parser: Any) -> None:
    options.add_to_parser(parser)


@events.init.add_listener  # type: ignore[untyped-decorator]
def _install(environment: Any, **_: Any) -> None:
    timings = collector.TimingsCollector(environment)
    if isinstance(environment.runner, WorkerRunner):
        return
    parsed = environment.parsed_options
    if not getattr(parsed, "class_picker", False):
        choose_users(environment, parsed.model, parsed.tokens_model)
    if environment.web_ui:
        webui.install(environment, timings, choose_users)


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def _forget_payloads(**_: Any) -> None:
    """A model may have been replaced since the last test."""
    _payloads.cache_clear()
