"""Where settings come from: flags, else the environment, else a file, else defaults.

What `settings` describes is all there is: names that it does not have are refused, wherever they
come from. `python -m attnserve_server.configuration` prints docs/configuration.md.
"""

import argparse
import difflib
import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attnserve_proto.commands import CommandError, Parser, values

from attnserve_server import __version__, options
from attnserve_server.options import Field
from attnserve_server.settings import Limits, PlaneSettings, Settings

FILE_VARIABLE = "ATTNSERVE_CONFIG"
_WRONG = 2  # the exit code where what was given is wrong

SECTIONS = (
    ("server", Settings),
    ("computing and connections", PlaneSettings),
    ("what is accepted", Limits),
)

# Variables of other programs: the commands, the health check, kernels and tests.
_OTHERS = re.compile(
    r"ATTNSERVE_(TARGET|TOKEN|HEALTH_\w+|KERNELS_ISA|ONNXRUNTIME|OPERATORS|TEST_\w+)"
)
# What Kubernetes sets in every pod for a service whose name begins with "attnserve".
_LINKS = re.compile(r"ATTNSERVE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_[A-Z]+(_\w+)?)")
_LINK = re.compile(r"(tcp|udp|sctp)://\S+")


def parser(given: Mapping[str, Any] | None = None) -> Parser:
    """A parser of all options; `given`: what did not come by flags, by the fields' names."""
    made = Parser(
        prog="attnserve-server",
        description="Serves the models of a repository over gRPC.",
        epilog="Each option may also stand in a TOML file (--config), by its name, and in the "
        "environment (ATTNSERVE_MAX_QUEUE_MS). Flags go before the environment, and that before "
        "the file. `attnserve-server make-token --help`: credentials for callers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--version", action="version", version=f"attnserve-server {__version__}")
    made.add_argument(
        "--config",
        type=values.path,
        metavar="CONFIG",
        help="TOML file: options by their names, without the dashes before them",
    )
    for title, kind in SECTIONS:
        options.add(made, title, kind, given or {})
    return made


def settings_of(parsed: argparse.Namespace) -> Settings:
    """The settings, of what such a parser has read."""
    return Settings(
        **options.values(parsed, Settings),
        **options.values(parsed, PlaneSettings),
        limits=Limits(**options.values(parsed, Limits)),
    )


def read(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """The settings, of everything that was given.

    Raises:
        CommandError: the file cannot be read, or it or the environment has a name or a value that
            is not allowed.
        SystemExit: the same of the arguments, said on standard error.
    """
    found = _file_of(arguments, environment)
    given = {} if found is None else of_file(found)
    return settings_of(parser(given | of_environment(environment)).parse_args(arguments))


def of_file(path: Path) -> dict[str, Any]:
    """What a TOML file gives, by the fields' names.

    Raises:
        CommandError: it cannot be read, or has a key or a value that is not allowed.
    """
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise _refusal(f"--config: given {path}: {error.strerror}; allowed: a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _refusal(f"--config: {path}: {error}; allowed: a TOML file") from None
    known = {field.key: field for field in all_fields()}
    given = {}
    for key, value in table.items():
        field = known.get(key)
        if field is None:
            raise _refusal(f"{path}: {key}: no such option{_nearest(key, known)}")
        given[field.name] = _checked(field, _text(field, value, f"{path}: {key}"), f"{path}: {key}")
    return given


def of_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """What variables give, by the fields' names; an empty one gives nothing.

    Raises:
        CommandError: a variable that begins as ours do is none, or its value is not allowed.
    """
    known = {field.variable: field for field in all_fields()}
    given = {}
    for name, text in environment.items():
        if not name.startswith("ATTNSERVE_") or name == FILE_VARIABLE or not text:
            continue
        if _OTHERS.fullmatch(name) or _LINKS.fullmatch(name):
            continue
        if name.endswith("_PORT") and _LINK.fullmatch(text):
            continue
        field = known.get(name)
        if field is None:
            raise _refusal(f"{name}: no such option{_nearest(name, known)}")
        given[field.name] = _checked(field, text, name)
    return given


def all_fields() -> Iterator[Field]:
    """Every option that there is."""
    for _, kind in SECTIONS:
        yield from options.fields_of(kind)


def _file_of(arguments: Sequence[str], environment: Mapping[str, str]) -> Path | None:
    """The file that the arguments name, else the environment."""
    named, where = environment.get(FILE_VARIABLE) or None, FILE_VARIABLE
    for word, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        flag, equals, value = word.partition("=")
        if flag == "--config":
            named, where = value if equals else following, flag
    try:
        return None if named is None else values.path(named)
    except argparse.ArgumentTypeError as refused:
        if where == "--config":
            return None  # the parser of all options will refuse it
        raise _refusal(f"{where}: {refused}") from None


def _text(field: Field, value: Any, where: str) -> str:
    """What a value of TOML is as the text of a flag: of the same meaning, or refused."""
    if field.is_switch and isinstance(value, bool):
        return str(value).lower()
    if field.is_number and isinstance(value, (int, float)) and not isinstance(value, bool):
        return repr(value)
    if not field.is_number and not field.is_switch and isinstance(value, str):
        return value
    wanted = "true or false" if field.is_switch else "a number" if field.is_number else "a text"
    raise _refusal(f"{where}: given {str(value)[:60]!r}, of another type; allowed: {wanted}")


def _checked(field: Field, text: str, where: str) -> Any:
    """The value of a text, as argparse would have it."""
    if field.is_switch:
        if text not in ("true", "false"):
            raise _refusal(f"{where}: given {text[:60]!r}; allowed: true or false")
        return text == "true"
    if field.option.choices and text not in field.option.choices:
        raise _refusal(f"{where}: given {text[:60]!r}; allowed: {field.option.allowed()}")
    try:
        return field.option.read(text)
    except argparse.ArgumentTypeError as refused:
        raise _refusal(f"{where}: {refused}") from None


def _nearest(name: str, known: Mapping[str, Field]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else "; see `attnserve-server --help`"


def _refusal(message: str) -> CommandError:
    return CommandError(message, _WRONG)


_PAGE = """\
# Configuration

Every option of `attnserve-server`, made by `python -m attnserve_server.configuration`; a test
compares this page with what the server takes. An option is given by its flag, `--max-queue-ms 200`;
by a variable of the environment, `ATTNSERVE_MAX_QUEUE_MS=200`; or in a TOML file that `--config` or
`ATTNSERVE_CONFIG` names:

```toml
repository = "/models"
max-queue-ms = 200
model-control = false
```

Flags go before the environment, and that before the file. A switch is `--model-control` or
`--no-model-control` as a flag, `true` or `false` elsewhere. Names that are in no table are refused,
in the file as in the environment; there, variables of the other commands and those that Kubernetes
sets for services (`ATTNSERVE_PORT=tcp://...`) are left alone, and empty ones give nothing."""


def page() -> str:
    """The text of docs/configuration.md."""
    parts = [_PAGE]
    for title, kind in SECTIONS:
        parts += [f"\n## {title[:1].upper()}{title[1:]}\n"]
        parts += ["| option | default | allowed | what |", "| --- | --- | --- | --- |"]
        parts += map(_row, options.fields_of(kind))
    return "\n".join(parts) + "\n"


def _row(field: Field) -> str:
    allowed = "on, off" if field.is_switch else field.option.allowed()
    default = "must be given" if field.required else _shown(field)
    cells = (f"`--{field.key}`", default, allowed, field.option.help)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _shown(field: Field) -> str:
    if field.is_switch:
        return "on" if field.default else "off"
    value = field.option.given(field.default)
    return "none" if value is None else f"`{value}`"


if __name__ == "__main__":
    print(page(), end="")
