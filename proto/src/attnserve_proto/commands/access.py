"""How commands reach a server that wants TLS, or to know who calls: options, read and checked.

A token is read from a file or the environment, never from the command line, which others can see.
"""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from attnserve_proto.commands import values
from attnserve_proto.commands.files import refuse_file
from attnserve_proto.commands.running import CommandError
from attnserve_proto.targets import is_local

if TYPE_CHECKING:
    import ssl

TOKEN_VARIABLE = "ATTNSERVE_TOKEN"

# Half of what a server reads of a call's headers.
_MOST_TOKEN = 8_192
_TOKEN_TEXT = re.compile(r"[\x21-\x7e]+")
_TOKEN = f"one token, in printable ASCII without blanks, {_MOST_TOKEN} bytes at most"
_OPTIONS = {
    "ca": "PEM file: the authorities that signed the server's certificate; turns TLS on",
    "certificate": "PEM file: the caller's own certificate chain, for mutual TLS",
    "key": "PEM file: its private key",
    "token_file": f"file with the caller's token; default: what {TOKEN_VARIABLE} holds",
}


class ClientAccess(TypedDict, total=False):
    """The arguments of a client of the SDK that say how a server is reached."""

    root_certificates: str
    certificate_chain: str
    private_key: str
    metadata: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Access:
    """How a server is reached; nothing given: plaintext, and nobody is named.

    Attributes:
        authorities: PEM file of those that signed the server's certificate; empty: plaintext.
        certificate, key: PEM files of the caller's own, both or none.
        token: shown with each call; empty: none.
    """

    authorities: str = ""
    certificate: str = ""
    key: str = ""
    token: str = field(default="", repr=False)

    def of_client(self) -> ClientAccess:
        """What a client of the SDK is made with, beside its target."""
        given = ClientAccess()
        if self.authorities:
            given["root_certificates"] = self.authorities
        if self.certificate:
            given["certificate_chain"], given["private_key"] = self.certificate, self.key
        if self.token:
            given["metadata"] = (("authorization", f"Bearer {self.token}"),)
        return given


PLAIN = Access()


def add_access(parser: Any, *, default: str | None = None, shown: bool = True) -> None:
    """Add the options to a parser, or to a group of one.

    Args:
        parser: of argparse.
        default: of all of them; `argparse.SUPPRESS` where another parser has them, too.
        shown: whether `--help` tells of them.
    """
    for name, told in _OPTIONS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=values.path,
            default=default,
            metavar="FILE",
            help=told if shown else argparse.SUPPRESS,
        )


def access_of(options: argparse.Namespace, targets: Sequence[str], *, prefix: str = "") -> Access:
    """What was given, its files read and checked.

    Args:
        options: with those of `add_access`.
        targets: of the servers; a token goes to another machine by TLS alone.
        prefix: of the options' names, `move-` say; with one a token is in its file alone.

    Raises:
        CommandError: code 2, naming the option.
    """
    authorities, certificate, key = options.ca, options.certificate, options.key
    for given, other in (("certificate", "key"), ("key", "certificate")):
        if getattr(options, given) is not None and getattr(options, other) is None:
            raise CommandError(
                f"--{prefix}{given}: given without --{prefix}{other}; allowed: both, or none", 2
            )
    if authorities is not None:
        _check(f"{prefix}ca", authorities, "certificates", _certificates(authorities))
    if certificate is not None:
        _check(
            f"{prefix}certificate",
            certificate,
            "a chain of certificates",
            _certificates(certificate),
        )
        wanted = f"the private key of {certificate}, without a passphrase"
        # Without a password openssl would ask for one at the terminal, and wait.
        _check(
            f"{prefix}key",
            key,
            wanted,
            lambda tls: tls.load_cert_chain(certificate, key, lambda: ""),
        )
    token, said_by = _token(options.token_file, prefix)
    is_tls = authorities is not None or certificate is not None
    for target in targets:
        if token and not is_tls and not is_local(target):
            raise CommandError(
                f"{said_by}: given without --{prefix}ca, for {target}: it would cross the network "
                "in plain text; allowed: with TLS, or for a server on this machine",
                2,
            )
    return Access(_text(authorities), _text(certificate), _text(key), token)


def _text(path: Path | None) -> str:
    return "" if path is None else str(path)


def _certificates(path: Path) -> "Callable[[ssl.SSLContext], object]":
    return lambda tls: tls.load_verify_locations(path)


def _check(
    option: str, path: Path, wanted: str, read: "Callable[[ssl.SSLContext], object]"
) -> None:
    """See whether a PEM file is what it should be."""
    import ssl  # which Locust patches first

    allowed = f"a PEM file with {wanted}"
    try:
        path.read_bytes()
        read(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    except ssl.SSLError:
        raise CommandError(
            f"--{option}: given {path}, which is none; allowed: {allowed}", 2
        ) from None
    except OSError as error:
        refuse_file(f"--{option}", path, error, allowed)


def _token(path: Path | None, prefix: str) -> tuple[str, str]:
    """The token, if there is one, and what gave it; no message says what it is."""
    said_by, given = TOKEN_VARIABLE, "given a text that is none"
    text = "" if prefix else os.environ.get(TOKEN_VARIABLE, "")
    if path is not None:
        said_by, given = f"--{prefix}token-file", f"given {path}, which holds none"
        try:
            with path.open("rb") as file:
                text = file.read(_MOST_TOKEN + 1).decode("latin-1")
        except OSError as error:
            refuse_file(said_by, path, error, _TOKEN)
    elif not text:
        return "", said_by
    token = text.strip()
    if not _TOKEN_TEXT.fullmatch(token) or len(text) > _MOST_TOKEN:
        raise CommandError(f"{said_by}: {given}; allowed: {_TOKEN}", 2)
    return token, said_by
