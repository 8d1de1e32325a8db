"""Requests that run together get what they would get alone."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from attnserve_client import AttendResult, AttentionClient
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import wire
from attnserve_server import validation
from attnserve_server.app import AttentionServer
from attnserve_server.engine import joining
from attnserve_server.engine.models import ModelStore
from attnserve_server.engine.work import AttendWork
from attnserve_server.scheduler import Job, Ticket
from attnserve_server.settings import Limits
from attnserve_server.wire import tensors
from hypothesis import given, settings
from hypothesis import strategies as st

HEADS, DIM = 4, 8
KV_HEADS = {"causal": 4, "grouped": 2, "half": 4, "capped": 4}


def work_of(store: ModelStore, model: str, arrays: dict[str, Any], **fields: Any) -> AttendWork:
    """A checked request."""
    message = pb.AttendRequest(model=model, **fields)
    for name, array in arrays.items():
        getattr(message, name).CopyFrom(tensors.message(array))
    kept, views = wire.split(message.SerializeToString(), pb.AttendRequest, wire.REQUEST_TENSORS)
    sizes = {name: view.nbytes for name, view in views.items()}
    plan = validation.plan(kept, sizes, store, Limits(), chunks_allowed=False)
    return validation.complete(plan, {n: s.array(views[n]) for n, s in plan.specs.items()})


def core_arrays(
    model: str, batch: int, query_len: int, key_len: int, seed: int
) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    dtype = np.float16 if model == "half" else np.float32
    value_dim = 6 if model == "grouped" else DIM
    shapes = {
        "query": (batch, HEADS, query_len, DIM),
        "key": (batch, KV_HEADS[model], key_len, DIM),
        "value": (batch, KV_HEADS[model], key_len, value_dim),
    }
    arrays = {n: generator.standard_normal(s).astype(dtype) for n, s in shapes.items()}
    if seed % 2:
        arrays["key_lengths"] = generator.integers(0, key_len + 1, batch)
    return arrays


shapes = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**31)),
    min_size=2,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(
    model=st.sampled_from(sorted(KV_HEADS)),
    drawn=shapes,
    variant=st.sampled_from(["", "fused", "reference", "blocked"]),
    weights=st.booleans(),
)
def test_ragged_requests_run_together_as_they_would_alone(
    server: AttentionServer,
    model: str,
    drawn: list[tuple[int, int, int, int]],
    variant: str,
    weights: bool,
) -> None:
    if model == "capped" and variant == "fused":
        variant = "softcap"
    works = []
    for batch, query_less, key_less, seed in drawn:
        lengths = [
            max(1, length - less % max(1, length // 8))
            for length, less in zip(drawn[0][1:3], (query_less, key_less), strict=True)
        ]
        arrays = core_arrays(model, batch, *lengths, seed)
        returns = pb.ReturnOptions(weights=weights and variant in ("", "reference"))
        works.append(work_of(server.store, model, arrays, variant=variant, returns=returns))
    first = works[0].kind
    together = [work for work in works if work.kind == first]
    joint = joining.attend_together(together)
    for work, results in zip(together, joint, strict=True):
        alone = joining.attend_together([work])[0]
        assert results.keys() == alone.keys()
        for name, array in results.items():
            assert array.shape == alone[name].shape
            assert array.dtype == alone[name].dtype
            if work.variant.entry.native:
                assert array.tobytes() == alone[name].tobytes()
            else:
                tolerance = 2e-3 if model == "half" else 2e-5
                np.testing.assert_allclose(array, alone[name], atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    "returns",
    [
        pb.ReturnOptions(entropy=True),
        pb.ReturnOptions(top_k=2, no_output=True),
        pb.ReturnOptions(mass_per_key=True, mass_by_distance=3, weights=True),
    ],
)
def test_diagnostics_are_joined_for_equal_lengths_only(
    server: AttentionServer, returns: pb.ReturnOptions
) -> None:
    works = [
        work_of(server.store, "causal", core_arrays("causal", 1, n, n, seed), returns=returns)
        for n, seed in ((11, 1), (11, 3), (12, 2))
    ]
    assert works[0].kind == works[1].kind != works[2].kind
    for work, results in zip(works[:2], joining.attend_together(works[:2]), strict=True):
        alone = joining.attend_together([work])[0]
        for name, array in alone.items():
            np.testing.assert_allclose(results[name], array, atol=2e-5, rtol=0)


@pytest.mark.parametrize("model", ["self", "cross"])
def test_layers_are_joined(server: AttentionServer, model: str) -> None:
    works = []
    for seed, length in enumerate((31, 32, 30)):
        generator = np.random.default_rng(seed)
        hidden = generator.standard_normal((2, length, 32)).astype(np.float32)
        arrays = {"hidden_states": hidden}
        if model == "cross":
            context = generator.standard_normal((2, length - 1 + seed % 2, 24))
            arrays["context"] = context.astype(np.float32)
        works.append(work_of(server.store, model, arrays))
    works = [work for work in works if work.kind == works[0].kind]
    assert len(works) > 1
    for work, results in zip(works, joining.attend_together(works), strict=True):
        alone = joining.attend_together([work])[0]
        assert results["output"].shape == alone["output"].shape
        np.testing.assert_allclose(results["output"], alone["output"], atol=2e-5, rtol=0)


def test_a_request_with_a_bias_of_its_own_runs_alone(server: AttentionServer) -> None:
    arrays = core_arrays("causal", 1, 5, 5, 0)
    biased = work_of(server.store, "causal", arrays | {"bias": np.ones((1, 1, 1, 5), np.float32)})
    plain = work_of(server.store, "causal", arrays)
    assert plain.joinable
    assert not biased.joinable
    assert plain.kind != biased.kind


@given(st.integers(1, 100_000))
def test_a_bucket_wastes_less_than_a_quarter_of_its_rows(length: int) -> None:
    end = joining.bucket(length)
    assert end >= length
    assert end - length < end / 4
    assert joining.bucket(end) == end


@pytest.fixture
def held(server: AttentionServer) -> Iterator[threading.Event]:
    """The only place to run is taken until the event is set."""
    release, taken = threading.Event(), threading.Event()

    def hold(works: Sequence[None]) -> Sequence[None]:
        taken.set()
        release.wait(20)
        return works

    job = Job(None, hold, "hold", joinable=False, sequences=1, tensor_bytes=0)
    holder = threading.Thread(target=lambda: server._scheduler.run(Ticket(), job))
    holder.start()
    taken.wait(5)
    yield release
    release.set()
    holder.join()


def test_callers_over_the_wire_are_batched_and_get_their_own(
    server: AttentionServer, client: AttentionClient, held: threading.Event
) -> None:
    lengths = (29, 32, 30, 31)
    requests = [core_arrays("causal", 1, n, n, 2 * n) for n in lengths]

    def send(arrays: dict[str, np.ndarray]) -> AttendResult:
        return client.attend(arrays["query"], arrays["key"], arrays["value"], model="causal")

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(send, arrays) for arrays in requests]
        deadline = time.monotonic() + 10
        while server._scheduler.waiting < 4 and time.monotonic() < deadline:
            time.sleep(0.005)
        held.set()
        together = [future.result(20) for future in futures]
    assert [result.timings.batch_size for result in together] == [4, 4, 4, 4]
    for arrays, result in zip(requests, together, strict=True):
        alone = send(arrays)
        assert alone.timings.batch_size == 1
        assert result.output is not None
        assert alone.output is not None
        np.testing.assert_allclose(result.output, alone.output, atol=2e-5, rtol=0)
