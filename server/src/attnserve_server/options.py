"""Options, each described once: beside the field that it sets, in `settings`.

A flag, a key of a file and a variable of the environment all come from that description.
"""

import argparse
import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

NUMBERS = (int, float)


@dataclass(frozen=True, slots=True)
class Option:
    """How a field is given, as the metadata of its annotation.

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

    def allowed(self) -> str:
        """What may be given, in words."""
        if self.choices:
            return ", ".join(self.choices)
        try:
            self.read("\0")
        except argparse.ArgumentTypeError as refused:
            return str(refused).partition("allowed: ")[2]
        return "any text"


@dataclass(frozen=True, slots=True)
class Field:
    """One option with the field that it sets.

    Attributes:
        name: of the field.
        kind: its types, None left out: `(int,)`, `(Path,)`.
        default: what it is unless it is given; `dataclasses.MISSING`: it must be.
    """

    name: str
    option: Option
    kind: tuple[type, ...]
    default: Any

    @property
    def key(self) -> str:
        """As it is called in a file, and behind two dashes."""
        return self.option.flag or self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """As it is called in the environment."""
        return f"ATTNSERVE_{self.key.replace('-', '_').upper()}"

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off."""
        return self.kind == (bool,)

    @property
    def is_number(self) -> bool:
        """Whether it is given as a number."""
        return all(kind in NUMBERS for kind in self.kind)

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is dataclasses.MISSING


def fields_of(kind: type) -> Iterator[Field]:
    """The options of a dataclass's own fields, in their order."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for name, annotation in inspect.get_annotations(kind).items():
        for option in getattr(annotation, "__metadata__", ()):
            base = typing.get_args(annotation)[0]
            kinds = [each for each in typing.get_args(base) or (base,) if each is not type(None)]
            yield Field(name, option, tuple(kinds), defaults[name])


def add(parser: argparse.ArgumentParser, title: str, kind: type, given: Mapping[str, Any]) -> None:
    """Let a parser take the options of a dataclass's own fields, under a title.

    Args:
        parser: to add them to.
        title: of the group.
        kind: the dataclass.
        given: what a file or the environment has given already, by the fields' names.
    """
    group = parser.add_argument_group(title)
    for field in fields_of(kind):
        option = field.option
        if field.is_switch:
            group.add_argument(
                f"--{field.key}",
                action=argparse.BooleanOptionalAction,
                dest=field.name,
                default=given.get(field.name, field.default),
                help=option.help,
            )
            continue
        required = field.required and field.name not in given
        default = argparse.SUPPRESS if field.required else option.given(field.default)
        group.add_argument(
            f"--{field.key}",
            dest=field.name,
            type=option.read,
            choices=option.choices or None,
            metavar=None if option.choices else field.key.replace("-", "_").upper(),
            required=required,
            default=given.get(field.name, default),
            help=option.help,
        )


def values(parsed: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The values of a dataclass's own fields, of what such a parser has read."""
    return {
        field.name: field.option.value(getattr(parsed, field.name)) for field in fields_of(kind)
    }
