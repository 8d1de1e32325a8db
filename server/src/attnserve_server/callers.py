"""The file of callers: who is known by which credential, and what each may do.

One caller's credential a line, `NAME ROLES CREDENTIAL [BOUND=VALUE ...]`:

    trainer  infer,sessions  sha256:9f86d081...    requests-per-second=200
    ops      admin           certificate:ops.example.org

A token is 256 random bits, shown once by `attnserve-server make-token`; the file has its SHA-256
digest. A caller may have several lines. What is behind a # is for people.
"""

import argparse
import hashlib
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from attnserve_dataplane import ADMIN, INFER, MOVE, SESSIONS, Known
from attnserve_proto import commands
from attnserve_proto.commands import CommandError, Parser, values

from attnserve_server.files import read_text
from attnserve_server.options import fields_of
from attnserve_server.settings import Limits, Settings, SettingsError, roles

_BITS = {"infer": INFER, "sessions": SESSIONS, "admin": ADMIN, "move": MOVE}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CERTIFICATE = re.compile(r"[!-~]{1,256}")
_PREFIX, _TOKEN_BYTES = "attn_", 32
_MOST_BYTES = 16 << 20

# As a line has them, and the fields of Limits that they stand for.
_BOUNDS = {
    field.key.removeprefix("caller-"): field
    for field in fields_of(Limits)
    if field.name.startswith("caller_")
}
_CALLS, _SESSIONS = 1024, 16_384


class CallersError(SettingsError):
    """The file of callers cannot be used; the message says where and why, and nothing secret."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one caller may have at once; 0: no bound of its own."""

    requests_per_second: float
    bytes_in_flight: int
    stored_bytes: int
    sessions: int
    session_bytes: int
    calls: int


def bounds_of(limits: Limits, *, identified: bool) -> Bounds:
    """The bounds of callers for whom no line says otherwise."""

    def most(given: int, otherwise: int) -> int:
        return given or (otherwise if identified else 0)

    return Bounds(
        limits.caller_requests_per_second,
        most(limits.caller_bytes_in_flight, limits.max_bytes_in_flight // 2),
        most(limits.caller_stored_bytes, limits.max_stored_bytes // 2),
        most(limits.caller_sessions, _SESSIONS),
        most(limits.caller_session_bytes, limits.max_kv_bytes // 2),
        most(limits.caller_calls, _CALLS),
    )


def role_bits(names: Sequence[str]) -> int:
    """Roles as the data plane has them."""
    return sum(_BITS[name] for name in names)


def certificate_role_bits(settings: Settings) -> int:
    """Those of callers with a certificate that no line names."""
    if settings.tls_client_authorities is None:
        return 0
    return role_bits(roles(settings.certificate_roles))


def read(path: Path, bounds: Bounds) -> list[Known]:
    """What the file says.

    Args:
        path: of the file.
        bounds: of callers whose line has none.

    Raises:
        CallersError: it cannot be read, or a line is not as it should be.
    """
    try:
        text = read_text(path, "text in UTF-8", _MOST_BYTES)
    except ValueError as error:
        raise CallersError(f"--callers: {path}: {error}") from None
    known, seen = [], set()
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            one = _known(words, bounds)
            if (one.kind, one.value) in seen:
                raise ValueError("a credential that an earlier line has")
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise CallersError(f"--callers: {path}: line {number}: {error}") from None
        seen.add((one.kind, one.value))
        known.append(one)
    return known


def _known(words: Sequence[str], bounds: Bounds) -> Known:
    if len(words) < 3:
        raise ValueError("given fewer than three words; allowed: NAME ROLES CREDENTIAL")
    name, given_roles, credential, *others = words
    if not _NAME.fullmatch(name):
        raise ValueError(f"name: given {name[:40]!r}; allowed: {_NAME.pattern}")
    bits = role_bits(roles(given_roles))
    kind, _, value = credential.partition(":")
    if kind == "sha256" and _DIGEST.fullmatch(value):
        content = bytes.fromhex(value)
    elif kind == "certificate" and _CERTIFICATE.fullmatch(value):
        content = value.encode()
    else:  # it may be a token by mistake: not repeated
        raise ValueError("credential: allowed: sha256: and 64 digits, or certificate: and a name")
    own = _own_bounds(others, bounds)
    return Known(
        name, bits, kind, content, own.requests_per_second, own.bytes_in_flight, own.stored_bytes,
        own.sessions, own.session_bytes, own.calls,
    )  # fmt: skip


def _own_bounds(words: Sequence[str], bounds: Bounds) -> Bounds:
    for word in words:
        key, _, given = word.partition("=")
        field = _BOUNDS.get(key)
        if field is None:
            raise ValueError(f"given {key[:40]!r}; allowed: {', '.join(_BOUNDS)}, each with =VALUE")
        try:
            value = field.option.value(field.option.read(given))
        except argparse.ArgumentTypeError as refused:
            raise ValueError(f"{key}: {refused}") from None
        bounds = replace(bounds, **{field.name.removeprefix("caller_"): value})
    return bounds


def make_token() -> tuple[str, str]:
    """A new token, and the credential that stands for it in the file."""
    token = _PREFIX + secrets.token_urlsafe(_TOKEN_BYTES)
    return token, f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"


def make_token_command(arguments: Sequence[str]) -> int:
    """The command `attnserve-server make-token`.

    Raises:
        CommandError: the file cannot be read or written, or would have two lines too alike.
    """
    parser = Parser(
        prog="attnserve-server make-token",
        description="Makes a token for a caller. It is shown once; the server has its digest.",
        allow_abbrev=False,
    )
    parser.add_argument("name", type=_name, help="of the caller")
    parser.add_argument(
        "--roles", type=roles, default=("infer", "sessions"), help="infer, sessions, admin: some"
    )
    parser.add_argument(
        "--callers",
        type=values.path,
        help="file to add the line to; only the token is printed then",
    )
    parsed = parser.parse_args(arguments)
    token, credential = make_token()
    line = f"{parsed.name} {','.join(parsed.roles) or 'none'} {credential}"
    if parsed.callers is None:
        print(f"token  {token}\nline   {line}")
        return 0
    _append(parsed.callers, line)
    print(token)
    return 0


def _append(path: Path, line: str) -> None:
    there = path.exists()
    try:
        before = path.read_text(encoding="utf-8") if there else ""
        with commands.replacing(path) as beside:
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file:
                newline = "" if not before or before.endswith("\n") else "\n"
                file.write(f"{before}{newline}{line}\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(
            f"--callers: {path}: {error}; allowed: a file that can be written"
        ) from None


def _name(given: str) -> str:
    if not _NAME.fullmatch(given):
        values.refuse(given, "a letter or digit, then up to 127 letters, digits and . _ / -")
    return given
