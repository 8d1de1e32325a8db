"""The programs in examples/, run as a user runs them against a server of its own."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from handmade import attention, write_core
from serving import process

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.needs_library


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("models")
    write_core(folder, "llama-core", attention(4, 16, num_kv_heads=2, mask="causal"))
    with process(folder) as server:
        yield server.address


def run(name: str, address: str, *options: str) -> str:
    command = [sys.executable, EXAMPLES / name, "--target", address, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_microbatches_give_the_tokens_of_local_attention(address: str) -> None:
    said = run("disaggregated_decode.py", address, "--sequences", "5", "--new-tokens", "12")
    assert "60 tokens of 5 sequences" in said
    assert "and no cache: yes" in said


def test_guessed_trees_give_the_tokens_of_local_attention_in_fewer_steps(address: str) -> None:
    said = run("speculative_decode.py", address, "--new-tokens", "80")
    assert "and no cache: yes" in said
    found = re.match(r"80 tokens in (\d+) steps", said)
    assert found is not None
    assert int(found[1]) < 80


def test_a_model_that_is_not_there_is_named(address: str) -> None:
    command = [sys.executable, EXAMPLES / "speculative_decode.py", "--target", address]
    done = subprocess.run([*command, "--model", "none"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "model: given 'none'" in done.stderr
