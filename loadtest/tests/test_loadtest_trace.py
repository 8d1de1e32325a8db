"""Recorded traffic: both public formats, and lines that are broken."""

import json
import tempfile
from pathlib import Path

import pytest
from attnserve_loadtest.errors import LoadTestError
from attnserve_loadtest.load.requests import Generation, Single
from attnserve_loadtest.load.trace import read_trace
from hypothesis import given
from hypothesis import strategies as st

# The first lines of the public files.
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2225670,879,55
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:00.017335+00:00,2399,6
"""
MOONCAKE = """\
{"timestamp": 0, "input_length": 6755, "output_length": 500, "hash_ids": [0, 1, 2, 3]}
{"timestamp": 0, "input_length": 7319, "output_length": 490, "hash_ids": [0, 14, 15, 16, 17]}
{"timestamp": 3052, "input_length": 7234, "output_length": 794, "hash_ids": [0, 28]}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "trace"


def test_azure(file: Path) -> None:
    file.write_text(AZURE)
    trace = read_trace(file)
    assert trace.kind == "azure"
    assert [(each.input_length, each.output_length) for each in trace.requests] == [
        (374, 44),
        (396, 109),
        (879, 55),
    ]
    arrivals = [each.arrival for each in trace.requests]
    assert arrivals == pytest.approx([0, 4.314579, 4.541977], abs=2e-6)
    file.write_text("\ufeff" + AZURE_2024.replace("\n", "\r\n"))
    assert read_trace(file).seconds == pytest.approx(0.007405, abs=2e-6)


def test_mooncake(file: Path) -> None:
    file.write_text(MOONCAKE)
    trace = read_trace(file)
    assert trace.kind == "mooncake"
    assert [each.arrival for each in trace.requests] == [0, 0, 3.052]
    assert trace.requests[0].blocks == (0, 1, 2, 3)
    assert [each.arrival for each in read_trace(file, limit=2).requests] == [0, 0]


def test_it_can_be_faster_shorter_and_without_sessions(file: Path) -> None:
    file.write_text(MOONCAKE)
    trace = read_trace(file)
    first, _, last = trace.arrivals(speed=2, length_scale=0.125)
    assert first.request == Generation(844, 62, 0.0, (0, 1, 2, 3), 64)
    assert last.due == pytest.approx(1.526)
    assert [each.request for each in trace.arrivals(single=True)] == [
        Single(6755),
        Single(7319),
        Single(7234),
    ]


@given(
    st.lists(
        st.tuples(st.integers(0, 10**9), st.integers(1, 1 << 20), st.integers(0, 1 << 20)),
        min_size=1,
    )
)
def test_any_order_of_lines_gives_requests_by_arrival(rows: list[tuple[int, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.jsonl"
        names = ("timestamp", "input_length", "output_length")
        file.write_text(
            "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)
        )
        trace = read_trace(file)
    start = min(rows)[0]
    expected = sorted(rows, key=lambda row: row[0])
    assert [each.arrival for each in trace.requests] == pytest.approx(
        [(row[0] - start) / 1e3 for row in expected]
    )
    assert [each.input_length for each in trace.requests] == [row[1] for row in expected]


BROKEN = [
    (AZURE + "2023-11-16 18:15:52,1\n", 5, "3 values between commas"),
    (AZURE + "yesterday,1,1\n", 5, "TIMESTAMP as"),
    (AZURE + "\n2023-11-16 18:15:52,1.5,1\n", 6, "ContextTokens, an integer, 1.."),
    (AZURE + "2023-11-16 18:15:52,0,1\n", 5, "ContextTokens, an integer, 1.."),
    (AZURE + "2023-11-16 18:15:52,7,-1\n", 5, "GeneratedTokens, an integer, 0.."),
    (AZURE + f"2023-11-16 18:15:52,{10**15},1\n", 5, "ContextTokens"),
    ("a,b,c\n1,2,3\n", 1, "the columns TIMESTAMP,ContextTokens,GeneratedTokens"),
    (MOONCAKE + "{\n", 4, "an object of JSON"),
    (MOONCAKE + "[1]\n", 4, "an object of JSON"),
    (MOONCAKE + '{"timestamp": "0", "input_length": 1, "output_length": 1}\n', 4, "timestamp"),
    (MOONCAKE + '{"timestamp": NaN, "input_length": 1, "output_length": 1}\n', 4, "timestamp"),
    (MOONCAKE + '{"timestamp": -1, "input_length": 1, "output_length": 1}\n', 4, "timestamp"),
    (MOONCAKE + '{"timestamp": 1, "output_length": 1}\n', 4, "input_length"),
    (MOONCAKE + '{"timestamp": 1, "input_length": true, "output_length": 1}\n', 4, "input_length"),
    (
        MOONCAKE + '{"timestamp": 1, "input_length": 512, "output_length": 1, "hash_ids": [1, 2]}',
        4,
        "hash_ids, integers, one for each 512 tokens of input_length, 1 at most",
    ),
    (
        MOONCAKE + '{"timestamp": 1, "input_length": 9, "output_length": 1, "hash_ids": ["a"]}',
        4,
        "hash_ids, integers",
    ),
]


@pytest.mark.parametrize(("text", "line", "allowed"), BROKEN)
def test_a_broken_line_is_named_by_its_number(
    file: Path, text: str, line: int, allowed: str
) -> None:
    file.write_text(text)
    with pytest.raises(LoadTestError) as raised:
        read_trace(file)
    said = str(raised.value)
    assert said.startswith(f"{file}, line {line}: given '")
    assert f"allowed: {allowed}" in said
    assert len(said) < 500


def test_no_file_no_text_and_no_requests(file: Path) -> None:
    with pytest.raises(LoadTestError, match="No such file"):
        read_trace(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LoadTestError, match="no text in UTF-8"):
        read_trace(file)
    for text in ("", AZURE.splitlines()[0]):
        file.write_text(text)
        with pytest.raises(LoadTestError, match="has no requests"):
            read_trace(file)
