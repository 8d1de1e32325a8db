"""`attnserve-loadtest context` against a grpc server whose heads are known by formula."""

import csv
import json
import signal
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from attnserve_lens.context.growth import growth
from attnserve_lens.context.measure import measure_rows, run_context
from attnserve_lens.context.report import write_context_report
from attnserve_lens.context.schema import ContextSettings
from attnserve_lens.context.text import FACTS, Context, random_pieces, sentences, text_pieces
from attnserve_loadtest.cli import main
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc

CLS, SEP = 1, 2
HEADS = ("uniform", "half of it on the fact", "half of it on the first token")


class Words:
    """Word-level ids, [CLS] before and [SEP] behind."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return [
            [CLS, *(self.ids.setdefault(word, len(self.ids) + 3) for word in text.split()), SEP]
            for text in texts
        ]


class Service(pb_grpc.AttentionServiceServicer):
    """Layers alike; three heads: `HEADS`."""

    def __init__(self) -> None:
        self.words = Words()
        self.facts = [ids[1:-1] for ids in self.words([fact for fact, _ in FACTS])]
        self.largest = 0

    def GetModel(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        kind = pb.CORE if request.name == "core" else pb.TRANSFORMER
        model = pb.Model(
            name=request.name, version="1", kind=kind, dtype=pb.FP32, mask=pb.BIDIRECTIONAL,
            num_heads=3, num_layers=2, vocab_size=500, max_seq_len=600,
            takes_text=request.name != "ids",
        )  # fmt: skip
        return pb.GetModelResponse(model=model)

    def ServerInfo(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        return pb.ServerInfoResponse(name="attnserve", version="t", limits=pb.Limits())

    def AttendTokens(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        given = request.text.texts or request.tokens.sequences
        sequences = [
            self.words([each])[0] if isinstance(each, str) else list(each.ids) for each in given
        ]
        answer = pb.AttendTokensResponse(model=request.model, version="1", variant="v")
        for ids in sequences:
            part = answer.sequences.add(ids=ids)
            if request.returns.weights:
                weights = np.stack([self.head(head, ids) for head in request.returns.heads])
                weights = np.stack([weights] * len(request.returns.layers)).astype(np.float32)
                self.largest = max(self.largest, weights.nbytes)
                part.weights.CopyFrom(
                    pb.Tensor(dtype=pb.FP32, shape=weights.shape, data=weights.tobytes())
                )
        answer.layers[:], answer.heads[:] = request.returns.layers, request.returns.heads
        return answer

    def head(self, head: int, ids: list[int]) -> np.ndarray:
        size = len(ids)
        row = np.full(size, 1 / size)
        if head == 1:
            for fact in self.facts:
                for at in range(size):
                    if ids[at : at + len(fact)] == fact:
                        row = row / 2
                        row[at : at + len(fact)] += 0.5 / len(fact)
        if head == 2:
            row = row / 2
            row[0] += 0.5
        return np.tile(row, (size, 1))


@pytest.fixture(scope="module")
def service() -> Iterator[tuple[str, Service]]:
    server = grpc.server(ThreadPoolExecutor(4))
    served = Service()
    pb_grpc.add_AttentionServiceServicer_to_server(served, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", served
    server.stop(0).wait()


def arguments(address: str, out: Path, *more: str) -> list[str]:
    common = ["context", "--target", address, "--model", "m", "--seq-lens", "48,96,192,384"]
    return [*common, "--depths", "0,0.5,1", "--trials", "3", "--out", str(out), *more]


def test_heads_known_by_formula_get_their_exponents(
    service: tuple[str, Service], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(service[0], tmp_path)) == 0
    report = json.loads((tmp_path / "context.json").read_text())
    assert report["settings"]["filler"] == "grammar"
    by_head = {(each["layer"], each["head"]): each for each in report["heads_fact"]}
    assert by_head[0, 0]["exponent"] == pytest.approx(-1, abs=1e-6)
    assert report["uniform"]["exponent"] == pytest.approx(-1, abs=1e-6)
    # 1/2 + fact / (2 n), and fact / (2 n).
    fact = report["fact_length"]
    expected = [0.5 + fact / (2 * n) for n in (48, 96, 192, 384)]
    assert by_head[1, 1]["values"] == pytest.approx(expected, rel=1e-5)
    assert by_head[0, 2]["values"] == pytest.approx([e - 0.5 for e in expected], rel=1e-5)
    assert by_head[0, 1]["low"] <= by_head[0, 1]["exponent"] <= by_head[0, 1]["high"]
    assert [each["head"] for each in report["best"][:2]] == [1, 1]
    effective = {(e["layer"], e["head"]): e for e in report["heads_effective"]}
    assert effective[0, 0]["values"] == pytest.approx([48, 96, 192, 384], rel=1e-5)
    assert effective[0, 0]["exponent"] == pytest.approx(1, abs=1e-6)
    said = capsys.readouterr()
    assert "2 of 6 heads hold the fact" in said.out


def test_every_file_holds_what_the_others_do(service: tuple[str, Service], tmp_path: Path) -> None:
    assert main(arguments(service[0], tmp_path, "--layers", "1", "--heads", "0,1")) == 0
    with (tmp_path / "context.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3 * 1 * 2
    assert {row["layer"] for row in rows} == {"1"}
    longest = [row for row in rows if row["seq_len"] == "384" and row["head"] == "0"]
    report = json.loads((tmp_path / "context.json").read_text())
    for row in longest:
        assert float(row["fact"]) == pytest.approx(float(row["uniform"]), rel=1e-4)
        assert float(row["beside"]) == pytest.approx(float(row["uniform"]), rel=1e-4)
        assert float(row["sinks"]) == pytest.approx(2 / 384, rel=1e-4)
    assert (tmp_path / "context.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "context.html").read_text()
    tree = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    assert len(tree.findall(".//figure/svg")) == 6
    assert "http" not in page
    assert f"{report['heads_fact'][0]['values'][-1]:.2%}" in page


def test_without_a_tokenizer_ids_are_drawn_and_it_is_said(
    service: tuple[str, Service], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--model", "ids", "--seq-lens", "64", "--depths", "0.5", "--trials", "1"]
    assert main(arguments(service[0], tmp_path, *more)) == 0
    assert "The contexts are random ids" in capsys.readouterr().out
    assert json.loads((tmp_path / "context.json").read_text())["uniform"]["exponent"] is None


def test_no_answer_is_larger_than_promised(
    service: tuple[str, Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnserve_lens.context.measure._ANSWER_BYTES", 2 * 4 * 384 * 384)
    service[1].largest = 0
    assert main(arguments(service[0], tmp_path, "--seq-lens", "384", "--trials", "1")) == 0
    assert service[1].largest == 2 * 4 * 384 * 384


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seq-lens", "20,64"], "--seq-lens: 20; allowed: 2"),
        (["--seq-lens", "64,700"], "--seq-lens: 700; allowed: up to 600, what m takes"),
        (["--model", "core"], "model core is a core; allowed: transformer models"),
        (["--filler", "few.txt"], "--filler: 5 tokens; allowed: 384 or more"),
        (["--filler", "none.txt"], "--filler: cannot read none.txt"),
    ],
)
def test_what_cannot_be_measured_is_said(
    service: tuple[str, Service],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("few.txt").write_text("One two three. Four five!")
    assert main(arguments(service[0], tmp_path, *more)) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["1.5", "-0.1", "x", "nan"])
def test_depths_are_from_0_to_1(text: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(arguments("127.0.0.1:1", tmp_path, "--depths", text))


def test_contexts_have_their_parts_where_they_say() -> None:
    words = Words()
    pieces = text_pieces(words, 200, 3, seed=0)
    assert pieces is not None
    for seq_len in (pieces.shortest, 77, 200):
        for depth in (0.0, 0.3, 1.0):
            context = pieces.context(seq_len, depth)
            assert len(context.ids) == seq_len
            assert (context.ids[0], context.ids[-1]) == (CLS, SEP)
            assert context.ids[slice(*context.fact)] == tuple(words([FACTS[3][0]])[0][1:-1])
            assert context.ids[slice(*context.question)] == tuple(words([FACTS[3][1]])[0][1:-1])
            assert context.question[1] == seq_len - 1
            parts = {*context.filler, *range(*context.fact), *range(*context.question)}
            assert parts == set(range(1, seq_len - 1))
    assert pieces.context(200, 0).fact[0] == 1
    assert pieces.context(200, 1).fact[1] == pieces.context(200, 1).question[0]
    assert pieces.context(200, 0.5).depth == pytest.approx(0.5, abs=0.06)


def test_filler_sentences_are_all_different() -> None:
    made = sentences(np.random.default_rng(0), 3000)
    assert len(set(made)) == 3000


def test_a_tokenizer_that_knows_no_words_is_noticed() -> None:
    assert text_pieces(lambda texts: [[CLS, 0, SEP] for _ in texts], 100, 0, seed=0) is None
    drawn = random_pieces(50, 100, 1, seed=0)
    assert len(set(drawn.fact) & set(drawn.question)) >= 4
    assert len(drawn.context(100, 0.5).ids) == 100


def test_rows_are_summed_where_they_should_be() -> None:
    context = Context(tuple(range(10)), (4, 6), (7, 9), (1, 2, 3, 6), 0.5)
    weights = np.random.default_rng(1).random((3, 2, 10))
    weights /= weights.sum(-1, keepdims=True)
    fact, beside, sinks, effective = measure_rows(weights, context)
    for head in range(3):
        rows = weights[head]
        assert fact[head] == pytest.approx(np.mean([row[4] + row[5] for row in rows]))
        near = [(row[2] + row[3] + row[6]) / 3 * 2 for row in rows]
        assert beside[head] == pytest.approx(np.mean(near))
        assert sinks[head] == pytest.approx(np.mean([row[0] + row[9] for row in rows]))
        entropies = [-sum(w * np.log(w) for w in row) for row in rows]
        assert effective[head] == pytest.approx(np.mean(np.exp(entropies)))


def test_growth_recovers_a_power() -> None:
    found = growth("x", (10, 100, 1000), [3 * n**-0.4 for n in (10, 100, 1000)])
    assert found.exponent == pytest.approx(-0.4)
    assert growth("x", (10,), [1.0]).exponent is None


def test_an_interruption_keeps_the_lengths_that_were_measured(
    service: tuple[str, Service], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths: list[int] = []

    def interrupt(seq_len: int, depth: float, trial: int) -> None:
        lengths.append(seq_len)
        if seq_len == 192:
            signal.raise_signal(signal.SIGINT)

    settings = ContextSettings((48, 96, 192, 384), (0.0, 1.0), 2, 0, "grammar")
    report = run_context(service[0], "m", settings, progress=interrupt)
    assert report.settings.seq_lens == (48, 96)
    assert {cell.seq_len for cell in report.cells} == {48, 96}
    assert len(report.cells) == 4
    assert report.uniform.exponent == pytest.approx(-1, abs=1e-6)
    assert write_context_report(report, tmp_path)[0].name == "context.json"
    assert 384 not in lengths
