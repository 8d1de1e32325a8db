"""Options from flags, the environment and a file: one meaning, one order, unknown names refused."""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from attnserve_proto.commands import CommandError
from attnserve_server import configuration
from attnserve_server.options import Field
from attnserve_server.settings import Limits, PlaneSettings, Settings
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
FIELDS = list(configuration.all_fields())
SWITCHES = [field for field in FIELDS if field.is_switch]


def read(*words: str, **environment: str) -> Settings:
    return configuration.read(words, environment)


def refusal(*words: str, **environment: str) -> str:
    with pytest.raises(CommandError) as refused:
        read("--repository", "x", *words, **environment)
    assert refused.value.code == 2
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


def toml(folder: Path, text: str) -> str:
    path = folder / "attnserve.toml"
    path.write_text(text)
    return str(path)


def example(field: Field) -> str:
    """A text that is not the default's, and allowed."""
    if field.is_switch:
        return str(not field.default).lower()
    if field.option.choices:
        return next(each for each in field.option.choices if each != field.default)
    for text in ("7", "32", "some.host", "1000", "admin", "some.host:8001"):
        try:
            value = field.option.value(field.option.read(text))
        except argparse.ArgumentTypeError:
            continue
        if value != field.default:
            return text
    raise AssertionError(field.name)


def value_of(settings: Settings, field: Field) -> Any:
    holder = settings.limits if hasattr(settings.limits, field.name) else settings
    return getattr(holder, field.name)


def test_every_field_is_an_option_of_its_own() -> None:
    names = [field.name for field in FIELDS]
    described = {field.name for kind in (Settings, Limits) for field in dataclasses.fields(kind)}
    assert set(names) == described - {"limits"}
    assert len(set(names)) == len(names)
    assert len({field.key for field in FIELDS}) == len(FIELDS)
    assert PlaneSettings().plane_keywords.keys() < set(names)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.key)
def test_an_option_means_the_same_wherever_it_stands(field: Field, tmp_path: Path) -> None:
    text = example(field)
    base = [] if field.required else ["--repository", "models"]
    if field.is_switch:
        flags = [f"--{'' if text == 'true' else 'no-'}{field.key}"]
    else:
        flags = [f"--{field.key}", text]
    by_flag = read(*base, *flags)
    quoted = text if field.is_switch or field.is_number else f'"{text}"'
    file = toml(tmp_path, f"{field.key} = {quoted}\n")
    assert read(*base, "--config", file) == by_flag
    assert read(*base, f"--config={file}") == by_flag
    assert read(*base, ATTNSERVE_CONFIG=file) == by_flag
    assert read(*base, **{field.variable: text}) == by_flag
    assert field.required or value_of(by_flag, field) != field.default


def test_flags_go_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    file = toml(tmp_path, 'repository = "a"\nport = 1\nmax-queue-ms = 10\nmodel-control = false\n')
    settings = read("--config", file)
    assert (settings.repository, settings.port, settings.model_control) == (Path("a"), 1, False)
    assert settings.limits.max_queue_seconds == 0.01
    variables = {"ATTNSERVE_PORT": "2", "ATTNSERVE_MAX_QUEUE_MS": "20"}
    assert read("--config", file, **variables).port == 2
    assert read("--config", file, "--port", "3", **variables).port == 3
    assert read("--config", file, "--port", "3", **variables).limits.max_queue_seconds == 0.02
    assert read("--config", file, "--model-control").model_control is True
    assert read("--config", file, ATTNSERVE_PORT="").port == 1  # nothing is given


def test_unknown_names_are_refused_and_the_nearest_is_named(tmp_path: Path) -> None:
    said = refusal("--config", toml(tmp_path, "max-queue-mss = 1\n"))
    assert "max-queue-mss: no such option; did you mean max-queue-ms?" in said
    assert "max_queue: no such option" in refusal("--config", toml(tmp_path, "max_queue = 1\n"))
    assert "limits: no such option" in refusal("--config", toml(tmp_path, "[limits]\nport = 1\n"))
    said = refusal(ATTNSERVE_MAX_QUEU="1")
    assert said == "ATTNSERVE_MAX_QUEU: no such option; did you mean ATTNSERVE_MAX_QUEUE?"
    with pytest.raises(SystemExit):
        read("--repository", "x", "--max-queu", "1")  # no beginnings of names either


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("port = 65536", "port: given '65536'; allowed: an integer, 0..65535"),
        ('port = "8001"', "port: given '8001', of another type; allowed: a number"),
        ("port = true", "port: given 'True', of another type; allowed: a number"),
        ("port = 1.5", "port: given '1.5'; allowed: an integer, 0..65535"),
        ("drain-seconds = nan", "drain-seconds: given 'nan'; allowed: a number of seconds"),
        ("model-control = 1", "model-control: given '1', of another type; allowed: true or false"),
        ("host = 1", "host: given '1', of another type; allowed: a text"),
        ("host = ['a']", "of another type; allowed: a text"),
        ('provider = "tpu"', "provider: given 'tpu'; allowed: auto, cuda, cpu"),
        ("port = ", "Invalid value"),
        ("port = 1\nport = 2", "Cannot overwrite a value"),
    ],
)
def test_values_that_are_not_allowed(line: str, said: str, tmp_path: Path) -> None:
    assert said in refusal("--config", toml(tmp_path, line))


def test_values_of_the_environment_that_are_not_allowed() -> None:
    assert refusal(ATTNSERVE_PORT="x") == (
        "ATTNSERVE_PORT: given 'x'; allowed: an integer, 0..65535"
    )
    assert "true or false" in refusal(ATTNSERVE_SPINNING="yes")
    assert "ATTNSERVE_PROVIDER: given 'x'; allowed: auto, cuda, cpu" in refusal(
        ATTNSERVE_PROVIDER="x"
    )


def test_a_file_that_is_none(tmp_path: Path) -> None:
    assert "No such file" in refusal("--config", str(tmp_path / "absent"))
    binary = tmp_path / "binary"
    binary.write_bytes(bytes(range(128, 256)))
    assert "allowed: a TOML file" in refusal("--config", str(binary))
    assert "ATTNSERVE_CONFIG: given" in refusal(ATTNSERVE_CONFIG="a\0b")
    with pytest.raises(SystemExit):
        read("--repository", "x", "--config", "")


def test_what_kubernetes_and_other_programs_set_is_left_alone() -> None:
    links = {
        "ATTNSERVE_PORT": "tcp://10.0.0.1:8001",
        "ATTNSERVE_PORT_8001_TCP": "tcp://10.0.0.1:8001",
        "ATTNSERVE_PORT_8001_TCP_ADDR": "10.0.0.1",
        "ATTNSERVE_SERVICE_HOST": "10.0.0.1",
        "ATTNSERVE_SERVICE_PORT": "8001",
        "ATTNSERVE_SERVICE_PORT_GRPC": "8001",
        "ATTNSERVE_METRICS_PORT": "tcp://10.0.0.2:8002",
        "ATTNSERVE_METRICS_SERVICE_HOST": "10.0.0.2",
        "ATTNSERVE_TARGET": "127.0.0.1:8001",
        "ATTNSERVE_HEALTH_NAME": "localhost",
    }
    assert read("--repository", "x", **links) == Settings(Path("x"))


@given(st.dictionaries(st.text(max_size=30), st.text(max_size=30), max_size=4))
def test_an_environment_of_any_names_is_read_or_refused(names: dict[str, str]) -> None:
    environment = {f"ATTNSERVE_{name.upper()}": value for name, value in names.items()}
    try:
        found = configuration.of_environment(environment)
    except CommandError:
        return
    assert all(not isinstance(value, float) or math.isfinite(value) for value in found.values())


def test_the_page_in_docs_is_current() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == configuration.page()
