"""What all commands share: readers, endings, files, progress."""

import os
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
from attnserve_proto import commands
from attnserve_proto.commands import CommandError, Progress, progress, values


@pytest.mark.parametrize(
    "text", ["a:1", "127.0.0.1:8001", "[::1]:80", "unix:/run/x", "x-y.z:65535"]
)
def test_targets_are_taken_as_they_are(text: str) -> None:
    assert values.target(text) == text
    assert text.startswith("unix") or values.target(f"grpc://{text}/") == text


def test_lists_keep_their_order_or_are_sorted() -> None:
    assert values.listed(values.integer(0))("5,0, 5") == (5, 0)
    assert values.ascending(values.integer(0))("5,0, 5") == (0, 5)


def test_what_was_given_is_shortened() -> None:
    with pytest.raises(ArgumentTypeError) as refused:
        values.integer(1, 9)("8" * 1000)
    assert len(str(refused.value)) < 120
    assert str(refused.value).endswith("allowed: an integer, 1..9")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (CommandError("no\nsuch  thing", 2), 2, "p: no such thing"),
        (KeyboardInterrupt(), 130, "p: interrupted; nothing was left half written"),
        (MemoryError(), 1, "p: there is not enough memory; ask for less at once"),
        (PermissionError(13, "Permission denied", "x"), 1, "p: [Errno 13] Permission denied: 'x'; "
         "look at that file or address, then run it again"),
    ],
)  # fmt: skip
def test_an_end_is_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    def work() -> int:
        raise error

    assert commands.run("p", work) == code
    assert capsys.readouterr().err == f"{said}\n"


def test_a_link_keeps_leading_to_the_file_that_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("before")
    (tmp_path / "link").symlink_to("real")
    with commands.replacing(tmp_path / "link") as beside:
        beside.write_text("after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "after"


def test_what_is_no_file_is_written_as_it_is() -> None:
    with commands.replacing(Path(os.devnull)) as beside:
        assert beside == Path(os.devnull)


def test_progress_says_how_long_the_rest_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Progress(40, "texts") as shown:
        for _ in range(10):
            now += 0.6
            shown.step("long ones")
    # A line once 5 seconds have passed: 9 steps took 5.4 s, 31 are left.
    assert capsys.readouterr().err == "9/40 texts, about 19 s left; long ones\n"
