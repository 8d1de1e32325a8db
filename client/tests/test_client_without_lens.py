"""The SDK where attnserve-lens is not installed: what needs it says what to install."""

import subprocess
import sys

import numpy as np
import pytest
from attnserve_client import AttendResult, Timings, _cli
from attnserve_proto.commands import extensions


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "entry_points", lambda **_: [])


@pytest.fixture
def result() -> AttendResult:
    weights = np.full((1, 1, 2, 2), 0.5, np.float32)
    return AttendResult("causal", "1", "fused", Timings(1, 1, 1, 1, 1), weights=weights)


@pytest.mark.usefixtures("without")
def test_a_result_says_what_to_install(result: AttendResult) -> None:
    with pytest.raises(ImportError, match=r"plot is not installed.*attnserve-client\[lens\]"):
        result.plot()
    with pytest.raises(ImportError, match=r"save_html is not installed.*attnserve-client\[lens\]"):
        result.save_html("page.html")
    assert result._repr_html_() is None


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("more", [[], ["a text", "--model", "m"], ["--help"], ["--serve"]])
def test_the_command_says_what_to_install(
    capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    assert _cli.main(["inspect", *more]) == 1
    expected = "attnserve: inspect is not installed; `pip install 'attnserve-client[lens]'`\n"
    assert capsys.readouterr().err == expected


def test_with_it_results_are_drawn(result: AttendResult) -> None:
    assert result.plot().axes
    assert "effective keys" in str(result._repr_html_())


def test_the_sdk_imports_none_of_it() -> None:
    script = (
        "import sys, attnserve_client, attnserve_client._cli;"
        "print(sorted({'attnserve_lens', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
