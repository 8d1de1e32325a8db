"""The simulated cluster against queues that have a formula, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
from attnserve_loadtest.cli import main
from attnserve_loadtest.load.plan import Arrival
from attnserve_loadtest.load.requests import Generation, Single
from attnserve_loadtest.load.simulation import Cluster, Simulation, simulate
from attnserve_loadtest.report.load_schema import Service, ServiceTime
from handmade import attention, write_core
from hypothesis import given
from hypothesis import strategies as st
from serving import process


def times(constant: float, linear: float = 0.0, quadratic: float = 0.0) -> ServiceTime:
    return ServiceTime(constant, linear, quadratic, 1, 10_000, 0.0, ())


def service(prompt: ServiceTime, step: ServiceTime | None = None, *, wire: float = 0.0) -> Service:
    return Service(None, prompt, step, None, wire, wire)


def poisson(rate: float, count: int, seed: int = 0) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


def waits(simulation: Simulation) -> np.ndarray:
    rows = simulation.measured.rows
    return rows["first"] - rows["due"]


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_server_is_the_queue_md1(load: float) -> None:
    """Pollaczek and Khinchine: the mean wait is load * s / (2 (1 - load))."""
    seconds = 0.01
    arrivals = [Arrival(float(due), Single(8)) for due in poisson(load / seconds, 60_000)]
    found = simulate(arrivals, Cluster(service(times(seconds)), 1))
    expected = load * seconds / (2 * (1 - load)) + seconds
    assert waits(found).mean() == pytest.approx(expected, rel=0.06)
    assert found.busy == pytest.approx(load, rel=0.03)


def test_two_choices_keep_queues_short() -> None:
    """Mitzenmacher: of n servers at 0.9, a random one has a queue; the better of two hardly."""
    seconds, servers, load = 0.01, 50, 0.9
    arrivals = [Arrival(float(due), Single(8)) for due in poisson(servers * load / seconds, 60_000)]
    alone = load * seconds / (2 * (1 - load)) + seconds
    assert waits(simulate(arrivals, Cluster(service(times(seconds)), servers))).mean() < alone / 2


def test_an_idle_server_takes_its_service_time_and_the_wire() -> None:
    prompt, step = times(0.001, 1e-5, 1e-9), times(0.0005, 1e-7)
    found = simulate(
        [Arrival(0.0, Generation(1000, 3))], Cluster(service(prompt, step, wire=0.002), 4)
    )
    # In chunks of 512, which together take what the whole takes.
    assert waits(found) == pytest.approx([0.002 + 0.001 + 0.01 + 0.001])
    contexts = np.array([1001, 1002, 1003])
    assert list(found.measured.tokens["context"]) == list(contexts)
    assert found.measured.tokens["took"] == pytest.approx(0.002 + 0.0005 + 1e-7 * contexts)


def test_tokens_that_wait_run_together() -> None:
    """64 sessions on one server take twice as long as one: the constant part is shared.

    Twice, for the first one's token runs alone, and from then on two groups take turns.
    """
    step = times(0.01)
    alone = simulate([Arrival(0.0, Generation(1, 50))], Cluster(service(times(0.0), step), 1))
    arrivals = [Arrival(0.0, Generation(1, 50)) for _ in range(64)]
    together = simulate(arrivals, Cluster(service(times(0.0), step), 1))
    assert together.seconds == pytest.approx(2 * alone.seconds, rel=0.05)
    one_by_one = simulate(arrivals, Cluster(service(times(0.0), step), 1, together=1))
    assert one_by_one.seconds == pytest.approx(64 * alone.seconds, rel=0.01)


def test_prefixes_that_are_kept_are_not_computed_again() -> None:
    prompt = times(0.0, 1e-5)
    blocks = [(1, 2), (1, 2), (1, 3), (4, 2)]
    arrivals = [
        Arrival(float(n), Generation(1024, 0, blocks=each, block_tokens=512))
        for n, each in enumerate(blocks)
    ]
    found = simulate(arrivals, Cluster(service(prompt), 1, prefix_tokens=10_000))
    left = np.array([1024, 1, 512, 1024])
    assert waits(found) == pytest.approx(left * 1e-5)
    assert found.found == pytest.approx((1023 + 512) / 4096)
    assert simulate(arrivals, Cluster(service(prompt), 1)).found == 0
    # Room for one block: the first of a prompt's, and the oldest goes.
    small = simulate(arrivals, Cluster(service(prompt), 1, prefix_tokens=600))
    assert small.found == pytest.approx((512 + 512) / 4096)


@given(
    count=st.integers(1, 60), servers=st.integers(1, 5), rate=st.floats(1, 500),
    seed=st.integers(0, 99), together=st.integers(1, 9),
)  # fmt: skip
def test_everything_is_answered_once_and_in_order(
    count: int, servers: int, rate: float, seed: int, together: int
) -> None:
    random = np.random.default_rng(seed)
    arrivals = [
        Arrival(float(due), Generation(int(random.integers(1, 2000)), int(random.integers(0, 9))))
        for due in poisson(rate, count, seed)
    ]
    prompt, step = times(0.001, 1e-5), times(0.001, 1e-6)
    cluster = Cluster(service(prompt, step, wire=0.001), servers, together, seed=seed)
    told: list[int] = []
    found = simulate(arrivals, cluster, step=told.append)
    rows, tokens = found.measured.rows, found.measured.tokens
    assert sum(told) == count == len(rows)
    assert list(rows["due"]) == [each.due for each in arrivals]
    assert (rows["first"] > rows["due"]).all()
    assert (rows["done"] >= rows["first"]).all()
    assert list(np.bincount(tokens["row"], minlength=count)) == list(rows["tokens"])
    assert (tokens["took"] >= 0.002).all()
    # A server never works on two things at once: all its work fits between first and last.
    work = sum(prompt.at(n) for n in rows["length"])
    assert work <= found.busy * found.seconds * servers + 1e-9
    assert found.busy <= 1 + 1e-9
    again = simulate(arrivals, cluster)
    assert (again.measured.rows["done"] == rows["done"]).all()


def test_service_times_that_lack_are_said() -> None:
    with pytest.raises(ValueError, match="no service times"):
        simulate([Arrival(0.0, Generation(8, 1))], Cluster(service(times(0.1)), 1))


MOONCAKE = [
    {"timestamp": n * 60, "input_length": 300 + 8 * (n % 30), "output_length": 1 + n % 6,
     "hash_ids": [n % 3]}
    for n in range(40)
]  # fmt: skip


@pytest.mark.needs_library
def test_a_trace_is_replayed_and_its_report_sizes_a_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Replay against a real server, then the same traffic at simulated clusters."""
    write_core(tmp_path / "models", "llama", attention(4, 8, num_kv_heads=2, mask="causal"))
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(line) + "\n" for line in MOONCAKE))
    with process(tmp_path / "models") as server:
        options = ["replay", str(trace), "--target", server.address, "--model", "llama",
                   "--layers", "2", "--slo", "first:p50=20s,between:p50=20s",
                   "--out", str(tmp_path)]  # fmt: skip
        assert main(options) == 0
        said = capsys.readouterr()
        report = json.loads((tmp_path / "load.json").read_text())
        (step,) = report["steps"]
        assert (step["due"], step["answered"], step["failed"]) == (40, 40, 0), report["failure"]
        assert report["settings"]["trace"] == "trace.jsonl (mooncake, 40 requests)"
        assert report["service"]["prompt"]["longest"] > 300
        assert "time to first output" in said.out
        assert main([*options[:-2], "--as", "single", "--out", str(tmp_path / "single")]) == 1
        assert "between:p50=20000ms, which these requests have not" in capsys.readouterr().err
        single = ["replay", str(trace), "--target", server.address, "--model", "llama",
                  "--as", "single", "--limit", "5", "--speed", "2",
                  "--out", str(tmp_path / "single")]  # fmt: skip
        assert main(single) == 0
        assert json.loads((tmp_path / "single/load.json").read_text())["steps"][0]["due"] == 5
    capsys.readouterr()
    base = ["simulate", str(trace), "--report", str(tmp_path / "load.json")]
    size = [*base, "--servers", "1,3", "--prefix-tokens", "4096", "--price-per-hour", "2"]
    size += ["--slo", "first:p99=30s,between:p99=30s", "--out", str(tmp_path / "simulation")]
    assert main(size) == 0
    said = capsys.readouterr()
    found = json.loads((tmp_path / "simulation/simulation.json").read_text())
    assert found["simulated"] is True
    assert [each["servers"] for each in found["sizes"]] == [1, 3]
    assert found["fewest"] == 1
    assert [each["good"] for each in found["sizes"]] == pytest.approx([1, 1])
    assert "simulated, not measured" in said.out
    assert (tmp_path / "simulation/simulation.png").read_bytes().startswith(b"\x89PNG")
    assert "simulated" in (tmp_path / "simulation/simulation.html").read_text()
    # Far longer than anything that was measured.
    assert main([*base, "--length-scale", "10", "--out", str(tmp_path)]) == 1
    assert "use --length-scale" in capsys.readouterr().err
    single_report = str(tmp_path / "single/load.json")
    assert main(["simulate", str(trace), "--report", single_report, "--out", str(tmp_path)]) == 1
    assert "has no service times of sessions" in capsys.readouterr().err
