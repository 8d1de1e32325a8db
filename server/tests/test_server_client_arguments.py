"""Every argument of both clients, given what it cannot take: the error names the argument.

Wrong types, values out of range, NaN, empty and huge ones. What the client cannot know to be wrong
(a model's limits) the server says.
"""

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnserve_client import (
    AsyncAttentionClient,
    AsyncBatch,
    AsyncSession,
    AttendOptions,
    AttentionClient,
    AttnserveError,
    Batch,
    ClientOptions,
    Session,
    SessionLayer,
    SessionOptions,
    Shards,
    StoredTensor,
    TokensOptions,
    page_hashes,
)

pytestmark = pytest.mark.needs_library

NAN, INF, HUGE = math.nan, math.inf, 10**400
# A value that is not to be tried, as the argument takes it: None, mostly.
INTEGERS = ["5", 5.0, NAN, INF, True, [], {}, -1, HUGE, b"1", None]
FLAGS = [1, 0, "yes", NAN, [], HUGE, b"", None]
NUMBERS = ["a", NAN, INF, -INF, True, [], {}, HUGE, b"1"]
TIMEOUTS = ["1", NAN, -1, -INF, 0, True, [], {}, b"1"]
LEASES = ["1", NAN, INF, -1, 0, HUGE, True, [], {}, 1e300]
TEXTS = [1, NAN, [], b"m", "\ud800", True, {}, None, "x" * 50_000]
NAMES = [*TEXTS, ""]
VERSIONS = [1.5, NAN, [], b"1", -1, "\ud800", True, {}, HUGE, None, "x" * 50_000]
ARRAYS = [
    object(),
    "text",
    b"bytes",
    {},
    [[1.0], [1.0, 2.0]],
    np.ones((1, 4, 2, 8), complex),
    np.ones((1, 4, 2, 8), "datetime64[s]"),
    np.ones((1, 4, 0, 8), np.float32),
    np.ones((1, 4, 2, 8), np.int64),
    np.ones(3, np.float32),
    NAN,
    HUGE,
]
LISTS = ["12", 0, 1.5, NAN, [1.5], [-1], [NAN], [True], ["1"], [HUGE], b"1", {}, [None], [[]]]
HASHES = [b"", "x", 5, [b""], [b"x" * 31], ["x" * 32], [5], NAN, {}, [None], b"x" * 32]

ONES = np.ones((1, 4, 2, 8), np.float32)
ROWS = np.ones((2, 4, 8), np.float32)
STORED = StoredTensor("handle", 1.0, (1,), np.dtype(np.float32))

LENGTHS = [*ARRAYS[:7], [8.0], [1, 2, 3], [-1], [99], [NAN], [True], "1", [2**63], []]

ATTEND: dict[str, list[Any]] = {
    "query": ARRAYS,
    "key": ARRAYS,
    "value": ARRAYS,
    "bias": ARRAYS,
    "sinks": [*ARRAYS, [0.5] * 3, [NAN] * 4, "1", [True]],
    "key_lengths": LENGTHS,
    "prefix_lengths": LENGTHS,
    "cu_seqlens_q": LENGTHS,
    "cu_seqlens_k": LENGTHS,
    "model": NAMES,
    "version": VERSIONS,
    "variant": TEXTS,
    "scale": NUMBERS,
    "softcap": [*NUMBERS, -1.0],
    "return_output": FLAGS,
    "return_weights": FLAGS,
    "return_entropy": FLAGS,
    "top_k": [*INTEGERS, 2**32 - 1],
    "return_mass_per_key": FLAGS,
    "mass_by_distance": [*INTEGERS, 2**32 - 1],
    "return_log_sum_exp": FLAGS,
    "priority": [*INTEGERS, 4],
}
LAYER: dict[str, list[Any]] = {
    "layer": [*INTEGERS, 1],
    "query": [*ARRAYS, None],
    "key": ARRAYS,
    "value": ARRAYS,
    "hidden_states": ARRAYS,
    "prefix_hashes": [each for each in HASHES if each not in (b"", {})],
    "return_output": FLAGS,
    "return_log_sum_exp": FLAGS,
    "return_entropy": FLAGS,
    "priority": [*INTEGERS, 4],
    "timeout": TIMEOUTS,
}
OPEN: dict[str, list[Any]] = {
    "model": NAMES,
    "max_tokens": [*INTEGERS, 0, 1 << 25],
    "num_layers": [*INTEGERS, 0, 1025],
    "version": VERSIONS,
    "layers": [
        *("full", 5, NAN, {}, [None], [5], ["full"], [SessionLayer()] * 3),
        *([SessionLayer(window=bad)] for bad in ("5", 1.5, -1, NAN, HUGE, True)),  # type: ignore[arg-type]
        *([SessionLayer(kept_first=bad)] for bad in ("5", 1.5, -1, NAN, HUGE)),  # type: ignore[arg-type]
        *([SessionLayer(cross=bad)] for bad in (1, None, "yes")),  # type: ignore[arg-type]
        *([SessionLayer(latent=bad)] for bad in (1, None, "yes")),  # type: ignore[arg-type]
    ],
    "cache_dtype": [5, NAN, [], "fp4", "", b"fp32", True, {}],
    "reserved_tokens": [*INTEGERS, 1 << 25],
    "cross_tokens": [*INTEGERS, 1 << 25],
    "prefix_hashes": [each for each in HASHES if each not in (b"", {})],
    "layer_models": [
        "self",
        5,
        NAN,
        {},
        [5],
        [None],
        [("a",)],
        [("a", 1.5)],
        [""],
        [("a", -1)],
        b"a",
    ],
    # Of a client of one server; those of several: tests/test_cluster_shards.py.
    "shards": [5, NAN, "heads", {}, True, [Shards(2)], Shards(2), Shards(1)],
    "lease": LEASES,
    "timeout": TIMEOUTS,
}
FORK: dict[str, list[Any]] = {
    "at": [each for each in INTEGERS if each is not None],
    "max_tokens": INTEGERS,
    "reserved_tokens": INTEGERS,
    "lease": LEASES,
    "timeout": TIMEOUTS,
}
TOKENS: dict[str, list[Any]] = {
    "inputs": [
        *(
            "one",
            b"one",
            5,
            NAN,
            [],
            {},
            [b"hi"],
            ["a", [1]],
            [5],
            [[1.5]],
            [[NAN]],
            [[True]],
            [[-1]],
        ),
        *([["1"]], [[HUGE]], {"ids": [[1]]}, {"input_ids": [[1, 2]], "attention_mask": [[1]]}),
        *({"input_ids": [[2, 5, 3]], "attention_mask": [mask]} for mask in ([1, 0, 1], [0] * 3)),
        *([[]], [None], ["\ud800"], None, [[10**9]], [["w1"]], ["w1 " * 100]),
    ],
    "targets": ["one", b"one", 5, [], {}, [b"hi"], ["a", [1]], [[1.5]], [[-1]], ["w1"]],
    "model": NAMES,
    "version": VERSIONS,
    "variant": TEXTS,
    "attention": list(TEXTS),
    "layers": [*LISTS, [], [99]],
    "heads": [*LISTS, [], [99]],
    "return_hidden": FLAGS,
    "return_pooled": FLAGS,
    "return_weights": [each for each in FLAGS if each is not None],
    "return_entropy": FLAGS,
    "return_effective_context": FLAGS,
    "mass_by_distance": [*INTEGERS, 2**32 - 1],
    "mass_on_first": [*INTEGERS, 2**32 - 1],
    "truncate": [each for each in FLAGS if each is not None],
    "timeout": TIMEOUTS,
}
TYPES = ["x", 5, NAN, [], {}, [[0]], [[0, "a"]], [[0, 1.5]], [[-1, 0]], [[0, HUGE]], [[0, 0]] * 2]
READ = dict.fromkeys(
    ("pixel_values", "input_features", "inputs_embeds", "encoder_hidden_states"), ARRAYS
)
TENSOR = {"tensor": ["handle", 5, None, NAN, {}], "timeout": TIMEOUTS}
OPTIONS: dict[str, list[Any]] = {
    "target": [5, None, b"127.0.0.1:1", "", [], NAN],
    "credentials": ["file.pem", 5, {}, True, NAN],
    "root_certificates": [5, b"x", "", "/none/such", "/dev/null", [], "\0"],
    "private_key": [5, "/none/such", "/dev/null", []],
    "certificate_chain": [5, "/none/such", "/dev/null", []],
    "metadata": [
        *("a", 5, NAN, [5], [("a",)], [("A", "x")], [("", "x")], [("a", 5)], [("a", b"x")]),
        *([("a-bin", "x")], [("a", "\n")], {"a": 5}, [("grpc-x", "x")], None, [("a b", "x")]),
    ],
    "channel_options": ["a", 5, NAN, [5], [("a",)], [(5, 5)], [("a", 1.5)], [("a", 1 << 40)], None],
    "compression": ["zip", 5, NAN, [], b"gzip", True, ""],
    "keepalive_time": TIMEOUTS,
    "keepalive_timeout": TIMEOUTS,
    "keepalive_permit_without_calls": FLAGS,
    "stream_threshold_bytes": INTEGERS,
    "shared_memory": FLAGS,
    "follow_moved": FLAGS,
    "shared_memory_bytes": [*INTEGERS, 0, 1 << 60],
}

# (call, arguments that are right, those that are not)
Row = tuple[str, dict[str, Any], dict[str, list[Any]]]
CLIENT_CALLS: list[Row] = [
    (
        "attend",
        {"query": ONES, "key": ONES, "value": ONES, "model": "causal"},
        ATTEND | {"timeout": TIMEOUTS},
    ),
    ("attend", {"hidden_states": ONES[0, 0], "model": "self"}, {"hidden_states": ARRAYS}),
    (
        "attend",
        {"hidden_states": np.ones((1, 2, 32), np.float32), "model": "cross"},
        {"context": ARRAYS},
    ),
    (
        "put_tensor",
        {"array": ONES},
        {
            "array": [*ARRAYS[:7], HUGE],
            "lease": LEASES,
            "timeout": TIMEOUTS,
        },
    ),
    ("renew_tensor", {"tensor": STORED}, TENSOR | {"lease": LEASES}),
    ("drop_tensor", {"tensor": STORED}, TENSOR),
    ("session", {"model": "causal", "num_layers": 1, "max_tokens": 64}, OPEN),
    (
        "sessions",
        {"count": 2, "model": "causal", "num_layers": 1, "max_tokens": 64},
        {"count": [*INTEGERS, 0, 1 << 20]} | OPEN,
    ),
    ("batch", {"sessions": []}, {"sessions": [[], 5, None, [5], "x"]}),
    ("save", {"session": None, "to": "/none/x"}, {"session": [5, None, "id"]}),
    (
        "load",
        {"source": "/none/x"},
        {
            "source": [5, None, NAN, b"x", []],
            "max_tokens": INTEGERS,
            "reserved_tokens": INTEGERS,
            "lease": LEASES,
            "timeout": TIMEOUTS,
        },
    ),
    ("attend_tokens", {"inputs": ["w1 w2"], "model": "bert"}, TOKENS | {"token_type_ids": TYPES}),
    ("attend_tokens", {"inputs": [[1, 2]], "model": "bert"}, {"token_type_ids": TYPES}),
    ("attend_tokens", {"model": "bert"}, READ),
    ("list_models", {}, {"timeout": TIMEOUTS}),
    ("get_model", {"name": "causal"}, {"name": NAMES, "version": VERSIONS, "timeout": TIMEOUTS}),
    ("server_info", {}, {"timeout": TIMEOUTS}),
    ("stream", {}, {"timeout": TIMEOUTS}),
    ("shared", {"array": ONES}, {"array": ARRAYS[:7]}),
    ("shared_empty", {"shape": (1,)}, {"shape": ["a", -1, [1.5], NAN, [-1], None, [HUGE]],
                                       "dtype": ["x", 5, object(), NAN, "O"]}),
]  # fmt: skip
REST = {name: LAYER[name] for name in ("layer", "key", "value", "timeout")}
SENT = LAYER.keys() - {"key", "value", "hidden_states"}
SESSION_CALLS: list[Row] = [
    (
        "attend",
        {"layer": 0, "query": ROWS, "key": ROWS, "value": ROWS},
        LAYER
        | {
            "parents": [*LISTS, [-1], [-2, 0], [-1, 5]],
            "cross_tokens": [*INTEGERS, 5],
            "return_weights": FLAGS,
            "queries_only": FLAGS,
        },
    ),
    (
        "send_query",
        {"layer": 0, "query": ROWS},
        {name: values for name, values in LAYER.items() if name in SENT}
        | {
            "parents": [*LISTS, [-1], [-2, 0], [-1, 5]],
            "cross_tokens": [*INTEGERS, 5],
            "return_weights": FLAGS,
        },
    ),
    ("attend_sent", {"layer": 0, "key": ROWS, "value": ROWS}, REST),
    ("commit", {"accepted": []}, {"accepted": LISTS, "timeout": TIMEOUTS}),
    ("truncate", {"length": 0}, {"length": [*INTEGERS, 5], "timeout": TIMEOUTS}),
    ("fork", {}, FORK),
    ("renew", {}, {"lease": LEASES, "timeout": TIMEOUTS}),
    ("close", {}, {"timeout": TIMEOUTS}),
]
BATCH_CALLS: list[Row] = [
    (
        "attend",
        {"layer": 0, "query": ROWS, "key": ROWS, "value": ROWS},
        {name: values for name, values in LAYER.items() if name != "prefix_hashes"}
        | {
            "new_tokens": [*LISTS, [1], [1, 2]],
            "parents": [5, "x", [], [5, 5], [["a"], None], [[-1, 5], None], NAN, {}],
            "cross_tokens": [*INTEGERS[:6], *INTEGERS[7:], [1], [5, "a"], [5, 5]],
            "prefix_hashes": [5, "x", [], [5, 5], [[b"x"], []], NAN, {}],
            "return_weights_of": [*LISTS, [5]],
            "queries_only": FLAGS,
        },
    ),
]
BATCH_CALLS += [
    (
        "send_query",
        {"layer": 0, "query": ROWS},
        {
            name: values
            for name, values in BATCH_CALLS[0][2].items()
            if name not in {"key", "value", "hidden_states", "queries_only"}
        },
    ),
    ("attend_sent", {"layer": 0, "key": ROWS, "value": ROWS}, REST),
]

SUBMIT: list[Row] = [("submit", CLIENT_CALLS[0][1], {"timeout": TIMEOUTS, "top_k": ["5", 5.0]})]
# What the server calls an argument, where it refuses it.
SERVERS_NAMES = {
    "inputs": ("tokens.sequences", "text.texts"),
    "targets": ("target_text", "target_tokens"),
    "name": ("model: given",),
    "pixel_values": ("tensors",),
    "input_features": ("tensors",),
    "inputs_embeds": ("tensors",),
    "encoder_hidden_states": ("tensors",),
    "return_weights_of": ("returns.weights_of",),
}


def cases(rows: list[Row]) -> Iterator[tuple[str, dict[str, Any], str, Any]]:
    """Call, arguments, the name of the one that is wrong, and its value."""
    for call, right, wrong in rows:
        for name, values in wrong.items():
            for value in values:
                yield call, right | {name: value}, name, value


async def called(it: Any, call: str, arguments: dict[str, Any]) -> None:
    """Make a call, and what belongs to it: queries are refused with the keys that they go with."""
    calls = [(call, arguments)]
    if call == "attend_sent":
        calls.insert(0, ("send_query", {"layer": 0, "query": ROWS}))
    elif call == "send_query":
        calls.append(("attend_sent", {"layer": 0, "key": ROWS, "value": ROWS}))
    for name, given in calls:
        result = getattr(it, name)(**given)
        if inspect.isawaitable(result):
            await result


async def found(
    rows: list[Row], make: Callable[[], Awaitable[Any]], finish: Callable[[Any], Awaitable[None]]
) -> list[str]:
    """What is wrong with the answers to all cases; `make` gives what has the calls, each time."""
    faults = []
    for call, arguments, name, value in cases(rows):
        case = f"{call}({name}={value!r:.60})"
        it = await make()
        try:
            await called(it, call, arguments)
        except (TypeError, ValueError, AttnserveError, OSError, MemoryError) as error:
            names = (name, *SERVERS_NAMES.get(name, ()))
            if not any(each in str(error) for each in names) or len(str(error)) > 2000:
                faults.append(f"{case}: {type(error).__name__}: {str(error)[:200]}")
        except Exception as error:
            faults.append(f"{case}: {type(error).__name__}: {str(error)[:200]}")
        else:
            faults.append(f"{case}: accepted")
        await finish(it)
    return faults


async def same(it: Any) -> Any:
    return it


async def nothing(it: Any) -> None:
    return None


async def of_blocking(address: str) -> list[str]:
    with AttentionClient(address, shared_memory=False) as client:
        calls = [row for row in CLIENT_CALLS if not row[0].startswith("shared")]
        faults = await found(calls, lambda: same(client), nothing)
        sharing = AttentionClient(address, shared_memory=True, shared_memory_bytes=1 << 20)
        shared = [row for row in CLIENT_CALLS if row[0].startswith("shared")]
        faults += await found(shared, lambda: same(sharing), nothing)
        sharing.close()
        with client.session("causal", num_layers=1, max_tokens=64) as one:

            async def abandoned(it: Session | Batch) -> None:
                it.abandon()

            faults += await found(SESSION_CALLS, lambda: same(one), abandoned)
        pair = client.sessions(2, "causal", num_layers=1, max_tokens=64)
        with client.batch(pair) as batch:
            faults += await found(BATCH_CALLS, lambda: same(batch), abandoned)
        with client.stream() as stream:
            faults += await found(SUBMIT, lambda: same(stream), nothing)
    return faults


async def of_asyncio(address: str) -> list[str]:
    async with AsyncAttentionClient(address, shared_memory=False) as client:
        calls = [row for row in CLIENT_CALLS if not row[0].startswith("shared")]
        faults = await found(calls, lambda: same(client), nothing)
        async with await client.session("causal", num_layers=1, max_tokens=64) as one:

            async def abandoned(it: AsyncSession | AsyncBatch) -> None:
                await it.abandon()

            faults += await found(SESSION_CALLS, lambda: same(one), abandoned)
        pair = await client.sessions(2, "causal", num_layers=1, max_tokens=64)
        async with client.batch(pair) as batch:
            faults += await found(BATCH_CALLS, lambda: same(batch), abandoned)
        async with client.stream() as stream:
            faults += await found(SUBMIT, lambda: same(stream), nothing)
    return faults


@pytest.mark.parametrize("of", [of_blocking, of_asyncio])
def test_each_argument_is_named_by_what_refuses_it(
    address: str, of: Callable[[str], Awaitable[list[str]]]
) -> None:
    async def main() -> list[str]:
        return await of(address)

    faults = asyncio.run(main())
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("kind", [AttentionClient, AsyncAttentionClient])
def test_each_argument_of_a_client_is_named_by_what_refuses_it(kind: type) -> None:
    async def main() -> list[str]:
        rows: list[Row] = [("client", {"target": "127.0.0.1:1"}, OPTIONS)]
        makers = type("Makers", (), {"client": staticmethod(kind)})
        return await found(rows, lambda: same(makers), nothing)

    faults = asyncio.run(main())
    assert not faults, "\n".join(faults)


def test_every_argument_is_in_the_table() -> None:
    rows = [("AttentionClient", AttentionClient, CLIENT_CALLS), ("Session", Session, SESSION_CALLS)]
    rows.append(("Batch", Batch, BATCH_CALLS))
    named = {
        "attend": AttendOptions,
        "attend_tokens": TokensOptions,
        "session": SessionOptions,
        "sessions": SessionOptions,
    }
    for title, kind, table in rows:
        calls = {name for name in dir(kind) if not name.startswith("_")}
        calls = {name for name in calls if callable(getattr(kind, name))} - {"abandon"}
        if kind is AttentionClient:
            calls -= {"close"}
        assert calls == {name for name, _, _ in table} - {"submit"}, title
        for call in calls:
            tried = set().union(*(wrong for name, _, wrong in table if name == call))
            parameters = inspect.signature(getattr(kind, call)).parameters
            wanted = set(parameters) - {"self", "options", "to"}
            if "options" in parameters:
                wanted |= set(named[call].__annotations__)
            assert wanted <= tried | {"timeout"}, f"{title}.{call}: {wanted - tried}"
    assert set(OPTIONS) == {"target", *ClientOptions.__annotations__}
    counted = [len(list(cases(table))) for _, _, table in rows]
    assert sum(counted) + len(list(cases([("", {}, OPTIONS)]))) >= 400


def test_what_is_right_is_taken(address: str, tmp_path: Path) -> None:
    with AttentionClient(
        address,
        metadata={"x-caller": "me", "x-bin": b"\0\1"},
        channel_options=[("grpc.max_metadata_size", 1 << 16)],
        compression="gzip",
        keepalive_time=30,
        keepalive_timeout=5.5,
        keepalive_permit_without_calls=True,
        stream_threshold_bytes=np.int64(1 << 20),
    ) as client:
        plain = client.attend(ONES, ONES, ONES, model="causal")
        same = client.attend(
            *(ONES, ONES, ONES),
            model="causal",
            timeout=INF,
            top_k=np.int32(1),
            scale=np.float32(8**-0.5),
            priority=np.uint8(1),
            return_weights=np.bool_(True),
            key_lengths=np.array([2], np.int32),
            version=1,
        )
        np.testing.assert_allclose(same.output, plain.output, atol=1e-6)
        large = np.ones((1, 4, 4096, 8), np.float32)
        assert client.attend(large, large, large, model="causal").output is not None
        with client.session("causal", num_layers=1, max_tokens=64, timeout=INF) as session:
            session.attend(np.int64(0), ROWS, ROWS, ROWS, timeout=INF)
            assert session.length == 2

        words = client.attend_tokens(["w1 w2 w3", "w4"], model="bert")
        width = max(map(len, words.ids))
        encoded = {
            "input_ids": [[*ids, *[0] * (width - len(ids))] for ids in words.ids],
            "attention_mask": [[1] * len(ids) + [0] * (width - len(ids)) for ids in words.ids],
            "token_type_ids": [[0] * width] * 2,
        }
        for given in (encoded, {name: np.array(each) for name, each in encoded.items()}):
            result = client.attend_tokens(given, model="bert")
            assert result.ids == words.ids
            assert words.hidden is not None
            assert result.hidden is not None
            for one, other in zip(result.hidden, words.hidden, strict=True):
                np.testing.assert_array_equal(one, other)
        one = client.attend_tokens({"input_ids": words.ids[0]}, model="bert", layers=[0])
        assert (one.ids, one.layers) == ([words.ids[0]], [0])
    for ids, page, error in (("abc", 2, TypeError), ([1.5], 2, TypeError), ([1], 0, ValueError)):
        with pytest.raises(error, match=r"ids|page_tokens"):
            page_hashes(ids, page)  # type: ignore[arg-type]
