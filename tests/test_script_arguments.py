"""The options of examples and benchmarks are as strict as the commands'."""

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from bad_arguments import BAD, actions, words_of, wrongly_answered

ROOT = Path(__file__).parents[1]
KINDS_OF = {
    "target": "--target",
    "name": "--model",
    "number": "--layers --sequences --new-tokens --seed --branches --depth --seconds --deadline "
    "--clients --good-within --batch --seq-len --rounds --num-heads --head-dim --window --threads "
    "--budget-seconds --transformer-seconds --processes --calls --callers --minutes "
    "--terminated --killed --kills --messages --sessions --settle",
    "numbers": "--lengths",
    "path": "--json --markdown --repository --plots --venvs --models --checkpoint --results "
    "--table --folder --faults --replay figures folder",
    "choice": "--sections action NAME --only --shape --dtype --stored",
}
KINDS = {name: kind for kind, names in KINDS_OF.items() for name in names.split()}

# What must be given, so that it is the wrong one that is refused.
NEEDED = {"serving_peers": ("install", "--venvs", "x"), "gpu_plots": ("x", "x")}
PLACES = {
    "action": ("?", "--venvs", "x"),
    "NAME": ("install", "?", "--venvs", "x"),
    "figures": ("?", "x"),
    "folder": ("x", "?"),
}


def scripts() -> list[Path]:
    """Those that take arguments; what peers take is the benchmark's to give."""
    return sorted(path for path in every_script() if "def _parser(" in path.read_text())


def every_script() -> list[Path]:
    """Whether it takes any or not."""
    folders = ("examples", "benchmarks", "benchmarks/faults")
    return [path for folder in folders for path in ROOT.glob(f"{folder}/*.py")]


@pytest.fixture(scope="module")
def parsers() -> Iterator[dict[str, argparse.ArgumentParser]]:
    """Those of all scripts, whose settings for a process of their own are undone."""
    environment, path = dict(os.environ), list(sys.path)
    sys.path[:0] = [
        str(ROOT / "examples"),
        str(ROOT / "benchmarks"),
        str(ROOT / "benchmarks/faults"),
    ]
    yield {script.stem: loaded(script)._parser() for script in scripts()}
    sys.path[:] = path
    os.environ.clear()
    os.environ.update(environment)


def loaded(script: Path) -> ModuleType:
    """A script as a module of a name that no module for tests has."""
    name = f"script_{script.stem}"
    spec = importlib.util.spec_from_file_location(name, script)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_script_that_takes_arguments_is_looked_at() -> None:
    for path in every_script():
        text = path.read_text()
        assert "ArgumentParser(" not in text, f"{path}: use attnserve_proto.commands.Parser"
        assert "parse_args(" not in text or path in scripts(), path
    assert len(scripts()) == 22


def test_every_option_refuses_what_it_does_not_take(
    parsers: dict[str, argparse.ArgumentParser],
) -> None:
    wrong, count = [], 0
    for script, parser in parsers.items():
        for _, name, _ in actions(parser):
            for given in BAD[KINDS[name]]:
                words = [*NEEDED.get(script, ()), *words_of(name, given)]
                if name in PLACES:
                    words = [word.replace("?", given) for word in PLACES[name]]
                count += 1
                found = wrongly_answered(parser.parse_args, words, name)
                wrong += [(script, *each) for each in found]
    assert wrong == []
    assert count >= 350


@pytest.mark.parametrize("script", ["examples/speculative_decode.py", "benchmarks/decode.py"])
def test_a_script_ends_with_the_parsers_code(script: str) -> None:
    option = {"examples/speculative_decode.py": "--depth"}.get(script, "--sections")
    command = [sys.executable, ROOT / script, option, "nan"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    [said] = done.stderr.splitlines()
    assert f"argument {option}: given 'nan'; allowed: " in said
