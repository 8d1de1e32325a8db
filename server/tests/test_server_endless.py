"""A graph that goes on for ever, for some requests: these end, and all others are served."""

from pathlib import Path

import numpy as np
import one_graph
import pytest
import serving
import tritonclient.grpc as triton
from attnserve_client import AttentionClient, DeadlineExceededError, NotFoundError, UnavailableError

# Adds 1 to the values once; 2 ** 62 times if key_lengths is above 3.
LINES = """
    few = Constant <value_int = 1> ()
    many = Constant <value_int = 4611686018427387904> ()
    bound = Constant <value_int = 3> ()
    lengths_above = Greater (key_lengths, bound)
    trips = Where (lengths_above, many, few)
    scalar = Constant <value_ints = [0]> ()
    trip = Gather (trips, scalar)
    always = Cast <to = 9> (few)
    output = Loop (trip, always, value) <body = turn (int64 i, bool on, float[b, h, s, d] given)
        => (bool on_out, float[b, h, s, d] taken)
        { on_out = Identity (on)
          one = Constant <value_float = 1.0> ()
          taken = Add (given, one) }>
"""


def test_a_run_without_end_or_deadline_is_stopped_after_the_longest_that_one_may_take(
    tmp_path: Path,
) -> None:
    one_graph.write(tmp_path, LINES)
    values = np.ones((1, serving.HEADS, 8, serving.DIM), np.float32)
    with (
        serving.process(tmp_path, "--max-run-seconds", "0.5") as server,
        AttentionClient(server.address) as client,
    ):

        def attend(length: int) -> np.ndarray | None:
            given = {"model": "causal", "key_lengths": [length]}
            return client.attend(values, values, values, **given).output

        np.testing.assert_array_equal(attend(2), values + 1)
        with pytest.raises(DeadlineExceededError, match=r"longer than 0\.5 s .*--max-run-seconds"):
            attend(5)
        np.testing.assert_array_equal(attend(2), values + 1)
    assert server.popen.returncode == 0


@pytest.mark.parametrize("known", [0, 50])
def test_a_run_without_end_ends_at_its_deadline_and_gives_its_place_back(
    known: int, tmp_path: Path
) -> None:
    """Whether runs of the graph are known to be short or not."""
    one_graph.write(tmp_path, LINES)
    values = np.ones((1, serving.HEADS, 8, serving.DIM), np.float32)
    with (
        serving.process(tmp_path, "--concurrency", "1") as server,
        AttentionClient(server.address) as client,
        triton.InferenceServerClient(server.address) as control,
    ):

        def attend(length: int, timeout: float) -> np.ndarray:
            result = client.attend(
                values, values, values, model="causal", key_lengths=[length], timeout=timeout
            )
            assert result.output is not None
            return result.output

        for _ in range(known):
            np.testing.assert_array_equal(attend(2, 20), values + 1)
        for _ in range(2):
            with pytest.raises(DeadlineExceededError):
                attend(5, 0.5)
            np.testing.assert_array_equal(attend(2, 20), values + 1)
        control.unload_model("causal")
        with pytest.raises((UnavailableError, NotFoundError), match="causal is unloaded"):
            attend(2, 1)
        assert server.popen.poll() is None
    assert server.popen.returncode == 0
