"""Any order of operations on KV sessions: SDK, server and kernels beside a plain cache in float64.

The data plane's own machine of random operations (`sessions_kv_machine_test.cc`) has none of these.
"""

import contextlib
import copy
import functools
import io
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from attnserve_client import (
    AttentionClient,
    Batch,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    Session,
    SessionLayer,
    page_hashes,
)
from attnserve_export.paged_batches import encode
from attnserve_server.app import AttentionServer
from attnserve_server.settings import MIB, Limits
from handmade import attention, write_core
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from numpy.typing import NDArray
from plain_sessions import PlainLayer, PlainSession
from serving import eventually, serving

pytestmark = pytest.mark.needs_library

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 16, 12
SHAPES = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))
PAGE = 16
MOST_SESSIONS = 12
TRUNCATABLE = 64  # tokens that a window always lets go of
MOST_CROSS = 24
MOST_LAYERS = 3
LAYERS = (
    SessionLayer(),
    SessionLayer(window=20),
    SessionLayer(window=7, kept_first=5),
    SessionLayer(cross=True),
)
CACHE_DTYPES = ("fp32", "fp16", "bf16", "int8", "fp8")

NUMBERS = st.integers(0, 1 << 32)

OPENING: dict[str, st.SearchStrategy[Any]] = {
    "count": st.integers(1, 3),
    "layers": st.lists(st.sampled_from(LAYERS), min_size=1, max_size=MOST_LAYERS),
    "cache_dtype": st.sampled_from(CACHE_DTYPES),
    "max_tokens": st.integers(1, 2000),
    "reserved_tokens": st.integers(1, 60) | st.integers(1, 2000),
}

Array = NDArray[Any]
Tensors = tuple[Array, ...]  # query, key and value


def random(generator: np.random.Generator, tokens: int) -> Tensors:
    """Of so many tokens."""
    return tuple(generator.standard_normal((tokens, *shape), dtype=np.float32) for shape in SHAPES)


@dataclass(frozen=True, repr=False)
class Document:
    """Tokens that several sessions may begin with: their hashes, and of each layer the tensors."""

    hashes: list[bytes]
    layers: list[Tensors]

    @classmethod
    def draw(cls, pages: int) -> "Document":
        """One of its own."""
        generator = np.random.default_rng()
        ids = generator.integers(0, 1 << 40, pages * PAGE)
        layers = [random(generator, len(ids)) for _ in range(MOST_LAYERS)]
        return cls(page_hashes(ids.tolist(), PAGE), layers)

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.hashes) * PAGE


DOCUMENTS = [Document.draw(5), Document.draw(3)]


@dataclass(frozen=True)
class Kind:
    """What sessions of one step have in common."""

    layers: tuple[SessionLayer, ...]
    cache_dtype: str

    @property
    def cross(self) -> bool:
        """Whether some layer's keys are written once."""
        return any(layer.cross for layer in self.layers)

    @property
    def windowed(self) -> bool:
        """Whether some layer gives pages back."""
        return any(layer.window for layer in self.layers)


@dataclass(eq=False)
class Held:
    """A session, and what it should hold.

    Attributes:
        on_document: how many of its first tokens are those of `document`.
        hashed: pages at its beginning that were given with hashes.
        least_length: the shortest that a window lets it become again.
        parents: of the tree that waits for commit, or is being computed.
        in_step: whether a step of it is under way.
    """

    session: Session
    plain: PlainSession
    kind: Kind
    document: Document
    on_document: int = 0
    hashed: int = 0
    least_length: int = 0
    cross_written: bool = False
    parents: list[int] = field(default_factory=list)
    in_step: bool = False
    gone: bool = False

    @property
    def busy(self) -> bool:
        """Whether only a step, or only commit, can go on."""
        return self.in_step or self.plain.tree_tokens > 0

    @property
    def room(self) -> int:
        """Tokens that it may still take."""
        return self.session.max_tokens - self.plain.length

    def gone_on(self) -> None:
        """A window may have given back what is more than TRUNCATABLE behind."""
        self.least_length = max(self.least_length, self.plain.length - TRUNCATABLE)

    def shortest(self) -> int:
        """Where it may be cut."""
        return self.least_length if self.kind.windowed else 0

    def cut(self, length: int) -> None:
        """Forget what is said of later tokens."""
        self.on_document = min(self.on_document, length)
        self.hashed = min(self.hashed, length // PAGE)


@dataclass(eq=False)
class Part:
    """A session's share of a step.

    Attributes:
        layers: of each layer query, key and value, as sent.
        before: what the session held.
        follows: whether the tokens are its document's.
        hashes: that are sent with it.
    """

    held: Held
    layers: list[Tensors]
    before: PlainSession
    cross_tokens: int
    follows: bool
    hashes: list[bytes]


@dataclass(eq=False)
class Step:
    """A step under way; `left`: its layers still to be computed, the next one last."""

    batch: Batch
    parts: list[Part]
    left: list[int]


def encoded(rows: Array, cache_dtype: str) -> Array:
    """As a cache of that type has them."""
    stored, scales = encode(rows, cache_dtype)
    return stored.astype(np.float64) * scales[..., None]


def only_if(condition: Callable[["Sessions"], Any]) -> Callable[..., Any]:
    """A rule that does nothing unless a condition holds, and else counts as an operation.

    As preconditions they would change what is drawn; and what is there depends on what was refused
    for lack of room, which may differ when the same is run again.
    """

    def only(act: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(act)
        def if_it_holds(self: "Sessions", **drawn: Any) -> None:
            if condition(self):
                act(self, **drawn)
                self.done["operations"] += 1

        return if_it_holds

    return only


class Sessions(RuleBasedStateMachine):
    """Operations of one client, whose stream ends with it."""

    def __init__(self, server: AttentionServer, done: Counter[str]) -> None:
        super().__init__()
        self.server = server
        self.done = done
        self.client = AttentionClient(f"127.0.0.1:{server.port}")
        self.all: list[Held] = []
        self.steps: list[Step] = []
        self.saved: list[tuple[Held, bytes]] = []

    def pick(self, which: int) -> Held:
        """One of the sessions."""
        return self.all[which % len(self.all)]

    def trees(self) -> list[Held]:
        """Sessions that wait for commit."""
        return [held for held in self.all if held.plain.tree_tokens and not held.in_step]

    def unless_full(self, name: str, act: Callable[[], Any], *, promised: bool = False) -> Any:
        """What `act` gives; None if there was no room, which nobody promised."""
        try:
            result = act()
        except ResourceExhaustedError:
            assert not promised, name
            self.done[f"{name}, full"] += 1
            return None
        self.done[name] += 1
        return result

    def refuse_if_busy(self, held: Held, act: Callable[[], Any]) -> bool:
        """Whether the session takes no other operation now; then it has said so."""
        if held.busy:
            with pytest.raises(FailedPreconditionError):
                act()
            self.done["refused while busy"] += 1
        return held.busy

    @rule(**OPENING)
    @only_if(lambda self: len(self.all) < MOST_SESSIONS)
    def open(
        self,
        count: int,
        layers: list[SessionLayer],
        cache_dtype: str,
        max_tokens: int,
        reserved_tokens: int,
    ) -> None:
        kind = Kind(tuple(layers), cache_dtype)
        sessions = self.unless_full(
            "open",
            lambda: self.client.sessions(
                count,
                "llama",
                num_layers=len(layers),
                max_tokens=max_tokens,
                layers=layers,
                cache_dtype=cache_dtype,
                reserved_tokens=min(reserved_tokens, max_tokens),
                cross_tokens=MOST_CROSS if kind.cross else 0,
            ),
        )
        self.all += [self.new(session, kind, DOCUMENTS[0]) for session in sessions or ()]

    @initialize(**OPENING)
    def begin_with_some(self, **opening: Any) -> None:
        self.open(**opening)

    @rule(
        windows=st.booleans(),
        cache_dtype=st.sampled_from(("fp32", "int8")),
        document=st.sampled_from(DOCUMENTS),
        pages=st.integers(0, 5),
        max_tokens=st.integers(1, 200),
    )
    @only_if(lambda self: len(self.all) < MOST_SESSIONS)
    def open_with_prefix(
        self, windows: bool, cache_dtype: str, document: Document, pages: int, max_tokens: int
    ) -> None:
        kind = Kind((LAYERS[0], LAYERS[2] if windows else LAYERS[0]), cache_dtype)
        asked = document.hashes[: min(pages, max_tokens // PAGE)]
        session = self.unless_full(
            "open with prefix",
            lambda: self.client.session(
                "llama",
                num_layers=2,
                max_tokens=max_tokens,
                layers=kind.layers,
                cache_dtype=cache_dtype,
                prefix_hashes=asked,
            ),
        )
        if session is None:
            return
        found = session.length
        assert found % PAGE == 0
        assert found <= len(asked) * PAGE
        self.done["prefix found"] += found > 0
        one = self.new(session, kind, document)
        one.on_document = one.least_length = one.plain.length = found
        one.hashed = found // PAGE
        for layer, (_, key, value) in zip(one.plain.layers, document.layers, strict=False):
            layer.append(encoded(key[:found], cache_dtype), encoded(value[:found], cache_dtype))
        self.all.append(one)

    @rule(
        which=NUMBERS,
        more=st.integers(0, 3),
        counts=st.lists(st.just(1) | st.integers(1, 40), min_size=4, max_size=4),
        trees=st.booleans(),
        follow=st.booleans(),
        seed=NUMBERS,
    )
    @only_if(lambda self: self.all)
    def begin(
        self, which: int, more: int, counts: list[int], trees: bool, follow: bool, seed: int
    ) -> None:
        self.begin_step(self.pick(which), counts[: 1 + more], trees, follow, seed)

    @rule(which=NUMBERS, prompt=st.integers(1, 90), trees=st.booleans(), seed=NUMBERS)
    @only_if(lambda self: self.all)
    def step(self, which: int, prompt: int, trees: bool, seed: int) -> None:
        step = self.begin_step(self.pick(which), [prompt, 1, 1], trees, not trees, seed)
        while step and step.left:
            self.compute(step)

    def begin_step(
        self, first: Held, counts: list[int], trees: bool, follow: bool, seed: int
    ) -> Step | None:
        """A step of `first`, and of as many others as there are, with layer 0; None if refused."""
        generator = np.random.default_rng(seed)
        one = random(generator, 1)
        if self.refuse_if_busy(first, lambda: self.client.batch([first.session]).attend(0, *one)):
            return None
        if not first.room:
            with pytest.raises(ResourceExhaustedError):
                first.session.attend(0, *one)
            return None
        others = [
            other
            for other in self.all
            if other is not first and other.kind == first.kind and other.room and not other.busy
        ]
        parts = []
        for held, count in zip([first, *others], counts, strict=False):
            tree = trees and generator.random() < 0.7
            parts.append(self.part(held, min(count, held.room), tree, follow, generator))
        order = generator.permutation(range(1, len(first.kind.layers))).tolist()
        step = Step(self.client.batch([p.held.session for p in parts]), parts, [*order, 0])
        promised = all(
            p.held.plain.length + len(p.layers[0][0]) <= p.held.session.reserved_tokens
            for p in parts
        )
        for part in parts:
            part.held.in_step = True
        self.steps.append(step)
        if self.unless_full("begin", lambda: self.compute(step) or step, promised=promised):
            return step
        self.restore(step)
        return None

    def part(
        self, held: Held, count: int, tree: bool, follow: bool, generator: np.random.Generator
    ) -> Part:
        """A session's tokens of a step that is to begin."""
        before, after = held.plain.length, held.plain.length + count
        follows = (
            follow
            and not tree
            and not held.kind.cross
            and held.on_document == before
            and after <= held.document.length
        )
        cross = held.kind.cross and not held.cross_written
        cross_tokens = int(generator.integers(1, MOST_CROSS + 1)) if cross else 0
        layers = []
        for number, layer in enumerate(held.kind.layers):
            tensors = random(generator, count)
            if follows:
                tensors = tuple(each[before:after] for each in held.document.layers[number])
            elif layer.cross:
                tensors = (tensors[0], *random(generator, cross_tokens)[1:])
            layers.append(tensors)
        hashes = held.document.hashes[held.hashed : after // PAGE] if follows else []
        part = Part(held, layers, copy.deepcopy(held.plain), cross_tokens, follows, hashes)
        held.parents = [int(generator.integers(-1, at)) for at in range(count)] if tree else []
        held.plain.begin(count, held.parents or None)
        return part

    @rule(which=NUMBERS, whole=st.booleans())
    @only_if(lambda self: self.steps)
    def go_on(self, which: int, whole: bool) -> None:
        step = self.steps[which % len(self.steps)]
        while True:
            if any(part.held.gone for part in step.parts):
                with pytest.raises(NotFoundError):
                    self.attend(step, step.left[-1])
                self.done["a session of a step is gone"] += 1
                step.batch.abandon()
                self.restore(step)
                return
            self.compute(step)
            if not whole or not step.left:
                return

    @rule(which=NUMBERS)
    @only_if(lambda self: self.steps)
    def abandon(self, which: int) -> None:
        step = self.steps[which % len(self.steps)]
        step.batch.abandon()
        self.restore(step)
        self.done["abandon"] += 1

    def restore(self, step: Step) -> None:
        """A step that was given up never was."""
        self.steps.remove(step)
        for part in step.parts:
            part.held.plain, part.held.in_step = part.before, False
            part.held.parents = []

    def attend(self, step: Step, layer: int) -> Any:
        """Send a layer."""
        query, key, value = ([part.layers[layer][at] for part in step.parts] for at in range(3))
        keys: Sequence[Any] = (key, value) if any(map(len, key)) else ()
        return step.batch.attend(
            layer,
            query,
            *keys,
            parents=[part.held.parents or None for part in step.parts],
            cross_tokens=[part.cross_tokens for part in step.parts],
            prefix_hashes=[part.hashes for part in step.parts],
            return_log_sum_exp=True,
            return_entropy=True,
        )

    def compute(self, step: Step) -> None:
        """The next layer, compared with the plain sessions'; with the last one the step ends."""
        layer = step.left[-1]
        result = self.attend(step, layer)
        step.left.pop()
        assert result.step_ended == (not step.left)
        for index, part in enumerate(step.parts):
            query, key, value = part.layers[layer]
            stored = [encoded(rows, part.held.kind.cache_dtype) for rows in (key, value)]
            expected = part.held.plain.attend(layer, query, *(stored if len(key) else ()))
            rows = slice(result.starts[index], result.starts[index + 1])
            for given, exact in zip(
                (result.output, result.log_sum_exp, result.entropy), expected, strict=True
            ):
                np.testing.assert_allclose(given[rows], exact, atol=5e-5, rtol=1e-5)
        self.done["layer"] += 1
        if step.left:
            return
        self.steps.remove(step)
        for part in step.parts:
            self.end(part)

    def end(self, part: Part) -> None:
        """The step's tokens are in the session."""
        held = part.held
        held.in_step = False
        held.plain.end()
        held.cross_written |= part.cross_tokens > 0
        if part.follows:
            held.on_document = held.plain.length
        if part.hashes:
            held.hashed = held.plain.length // PAGE
        if not held.parents:
            held.gone_on()
        self.done["tree" if held.parents else "step"] += 1

    @rule(which=NUMBERS, most=st.integers(0, 8), seed=NUMBERS)
    @only_if(lambda self: self.trees())
    def commit(self, which: int, most: int, seed: int) -> None:
        held = self.trees()[which % len(self.trees())]
        with pytest.raises(InvalidArgumentError):
            held.session.commit([len(held.parents)])
        generator = np.random.default_rng(seed)
        path = [-1]
        while children := [n for n, parent in enumerate(held.parents) if parent == path[-1]]:
            path.append(int(generator.choice(children)))
        accepted = path[1 : 1 + most]
        held.session.commit(accepted)
        held.plain.commit(accepted)
        held.parents = []
        held.gone_on()
        self.done["commit"] += 1

    @rule(which=NUMBERS, share=st.floats(0, 1))
    @only_if(lambda self: self.all)
    def truncate(self, which: int, share: float) -> None:
        held = self.pick(which)
        length = held.shortest() + round(share * (held.plain.length - held.shortest()))
        if self.refuse_if_busy(held, lambda: held.session.truncate(length)):
            return
        with pytest.raises(InvalidArgumentError):
            held.session.truncate(held.plain.length + 1)
        # There may be no room for its own copy of what is shared.
        if self.unless_full("truncate", lambda: held.session.truncate(length) or held):
            held.plain.truncate(length)
            held.cut(length)

    @rule(
        which=NUMBERS,
        share=st.floats(0, 1),
        growth=st.integers(1, 150),
        reserved_tokens=st.integers(1, 200),
    )
    @only_if(lambda self: self.all)
    def fork(self, which: int, share: float, growth: int, reserved_tokens: int) -> None:
        held = self.pick(which)
        length = held.shortest() + round(share * (held.plain.length - held.shortest()))
        most = length + growth
        reserved = min(reserved_tokens, most)

        def act() -> Session:
            return held.session.fork(length, max_tokens=most, reserved_tokens=reserved)

        if self.refuse_if_busy(held, act):
            return
        session = self.unless_full("fork", act)
        if session is None:
            return
        other = copy.copy(held)
        other.session, other.plain = session, held.plain.fork(length)
        other.cut(length)
        other.gone_on()
        self.all.append(other)

    @rule(which=NUMBERS)
    @only_if(lambda self: self.all)
    def save(self, which: int) -> None:
        held = self.pick(which)
        file = io.BytesIO()
        if self.refuse_if_busy(held, lambda: self.client.save(held.session, file)):
            return
        if not self.unless_full("save", lambda: self.client.save(held.session, file) or file):
            return
        other = copy.copy(held)
        other.plain, other.hashed = copy.deepcopy(held.plain), 0
        self.saved.append((other, file.getvalue()))

    @rule(which=NUMBERS)
    @only_if(lambda self: self.saved and len(self.all) < MOST_SESSIONS)
    def load(self, which: int) -> None:
        was, content = self.saved[which % len(self.saved)]
        session = self.unless_full("load", lambda: self.client.load(io.BytesIO(content)))
        if session is None:
            return
        assert session.max_tokens == was.session.max_tokens
        other = copy.copy(was)
        other.session, other.plain = session, copy.deepcopy(was.plain)
        other.gone = False
        self.all.append(other)

    @rule(which=NUMBERS, expire=st.booleans())
    @only_if(lambda self: len(self.all) > 4)
    def close_or_expire(self, which: int, expire: bool) -> None:
        held = self.pick(which)
        if expire:
            held.session.renew(lease=0.002)
            time.sleep(0.003)
        else:
            held.session.close()
        self.done["expire" if expire else "close"] += 1
        held.gone = True
        self.all.remove(held)
        with pytest.raises(NotFoundError):
            held.session.renew()

    @rule(which=NUMBERS)
    @only_if(lambda self: self.all)
    def misuse(self, which: int) -> None:
        held = self.pick(which)
        own, held.session.id = held.session.id, secrets.token_hex(16)
        with pytest.raises(NotFoundError):
            held.session.renew()
        held.session.id = own
        if held.busy:
            return
        generator = np.random.default_rng()
        one = random(generator, 1)
        # The session of its own, which a step that could not begin doesn't change.
        begin = self.client.batch([held.session]).attend
        with pytest.raises(ResourceExhaustedError):
            begin(0, *random(generator, held.room + 1))
        if not held.room:
            return
        with pytest.raises(InvalidArgumentError):
            begin(0, *one, parents=[[0]])
        with pytest.raises(InvalidArgumentError):
            self.client.batch([held.session, held.session]).attend(0, *random(generator, 2))
        self.done["misuse"] += 1

    def new(self, session: Session, kind: Kind, document: Document) -> Held:
        """An opened session, beside a plain one."""
        layers = [PlainLayer(n.window or 0, n.kept_first, n.cross) for n in kind.layers]
        return Held(session, PlainSession(layers), kind, document)

    def metric(self, name: str) -> float:
        """As Prometheus reads it."""
        value = self.server.metrics.registry.get_sample_value(f"attnserve_kv_{name}")
        assert value is not None
        return value

    @invariant()
    def sessions_are_counted_and_as_long_as_they_should_be(self) -> None:
        counts = self.server.plane.kv_sessions()
        assert counts["sessions"] == len(self.all)
        assert counts["bytes_in_use"] <= counts["bytes_promised"] <= counts["max_bytes"]
        for held in self.all:
            assert held.session.length == held.plain.length

    def teardown(self) -> None:
        """Half of the sessions are closed, half expire, some in steps: no page is held."""
        for number, held in enumerate(self.all):
            if number % 2:
                held.session.close()
            else:
                held.session.renew(lease=0.01)
        try:
            for name in ("sessions", "pages", "bytes", "promised_bytes"):
                assert eventually(lambda name=name: self.metric(name) == 0), name
        finally:
            self.client.close()


@contextlib.contextmanager
def small_server(folder: Any) -> Iterator[AttentionServer]:
    """A server whose pages are often all in use."""
    causal = attention(HEADS, DIM, num_kv_heads=KV_HEADS, value_head_dim=VALUE_DIM, mask="causal")
    write_core(folder, "llama", causal)
    limits = Limits(max_kv_bytes=4 * MIB, max_kv_lease=600, kv_lease=600)
    with serving(folder, limits=limits) as server:
        yield server


def operate(folder: Any, operations: int, *, machines: int, each: int) -> Counter[str]:
    """At least so many operations; what was done."""
    done: Counter[str] = Counter()
    with small_server(folder) as server:
        while done["operations"] < operations:
            run_state_machine_as_test(
                lambda: Sessions(server, done),
                settings=settings(max_examples=machines, stateful_step_count=each, deadline=None),
            )
    return done


def test_sessions_do_what_a_plain_cache_does(tmp_path: Any) -> None:
    operate(tmp_path, 300, machines=8, each=40)


@pytest.mark.slow
def test_sessions_do_what_a_plain_cache_does_20000_times(tmp_path: Any) -> None:
    done = operate(tmp_path, 20_000, machines=20, each=100)
    for name in (
        "open, full",
        "prefix found",
        "a session of a step is gone",
        "abandon",
        "tree",
        "commit",
        "truncate",
        "fork",
        "load",
        "close",
        "expire",
        "misuse",
    ):
        assert done[name], name
