"""Options of the command line, each described once: beside the field that it sets."""

import argparse
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Option:
    """How a field is given on the command line, as the metadata of its annotation.

    Attributes:
        help: what it means.
        read: makes a value of the text; fields that are bool have --flag and --no-flag instead.
        flag: without its dashes; empty: as the field is called.
        choices: what may be given; empty: whatever `read` takes.
        unit: the field's value is what was given times this.
        none: what is given for None.
    """

    help: str
    read: Callable[[str], Any] = str
    flag: str = ""
    choices: tuple[str, ...] = ()
    unit: float = 1
    none: int | None = None

    def value(self, given: Any) -> Any:
        """The field's value, of what was read."""
        if self.none is not None and given == self.none:
            return None
        return given if self.unit == 1 else given * self.unit

    def given(self, value: Any) -> Any:
        """What gives a value."""
        if value is None:
            return self.none
        return value if self.unit == 1 else round(value / self.unit)


def add(parser: argparse.ArgumentParser, title: str, kind: type) -> None:
    """Let a parser take the options of a dataclass's own fields, under a title."""
    group = parser.add_argument_group(title)
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for name, option in _options(kind):
        flag = option.flag or name.replace("_", "-")
        default = defaults[name]
        if isinstance(default, bool):
            group.add_argument(
                f"--{flag}",
                action=argparse.BooleanOptionalAction,
                dest=name,
                default=default,
                help=option.help,
            )
            continue
        required = default is dataclasses.MISSING
        group.add_argument(
            f"--{flag}",
            dest=name,
            type=option.read,
            choices=option.choices or None,
            metavar=None if option.choices else flag.replace("-", "_").upper(),
            required=required,
            default=argparse.SUPPRESS if required else option.given(default),
            help=option.help,
        )


def values(parsed: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The values of a dataclass's own fields, of what such a parser has read."""
    return {name: option.value(getattr(parsed, name)) for name, option in _options(kind)}


def _options(kind: type) -> Iterator[tuple[str, Option]]:
    for name, annotation in inspect.get_annotations(kind).items():
        for option in getattr(annotation, "__metadata__", ()):
            yield name, option
