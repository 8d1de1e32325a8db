"""Certificates for a test, made by the `openssl` command."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Identity:
    """PEM files of one party."""

    certificate: Path
    key: Path

    def pem(self) -> tuple[bytes, bytes]:
        """Key and certificate, in grpc's order."""
        return self.key.read_bytes(), self.certificate.read_bytes()


class Authority:
    """Signs certificates for 127.0.0.1 and localhost.

    Args:
        folder: where its files go.
    """

    def __init__(self, folder: Path) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("no openssl command here")
        self._folder = folder
        self.certificate, self._key = folder / "authority.pem", folder / "authority.key"
        self._openssl(
            *("req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=an authority of tests"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-keyout", self._key, "-out", self.certificate),
        )

    def issue(self, name: str) -> Identity:
        """A party's certificate, signed."""
        made = Identity(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        request, names = self._folder / f"{name}.csr", self._folder / "names"
        names.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        self._openssl(
            *("req", "-nodes", "-subj", f"/CN={name}"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-keyout", made.key, "-out", request),
        )
        self._openssl(
            *("x509", "-req", "-in", request, "-days", "2", "-CAcreateserial"),
            *("-CA", self.certificate, "-CAkey", self._key, "-extfile", names),
            *("-out", made.certificate),
        )
        return made

    @staticmethod
    def _openssl(*arguments: str | Path) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True)
