"""The PEM files of TLS, read before anything listens."""

import ssl
from dataclasses import dataclass
from pathlib import Path

from attnserve_server.files import read_text
from attnserve_server.settings import Settings, SettingsError


class CertificateError(SettingsError):
    """TLS cannot be had as it was asked for; the message names the option."""


@dataclass(frozen=True, slots=True)
class TlsTexts:
    """Contents of the files; all None: no TLS."""

    certificate_chain: str | None = None
    private_key: str | None = None
    client_authorities: str | None = None


def read(settings: Settings) -> TlsTexts:
    """What the settings name.

    Raises:
        CertificateError: a file cannot be read, or one is named without those that it needs: the
            server would talk in the clear, or to anybody, though it was told not to.
    """
    certificate, key = settings.tls_certificate, settings.tls_key
    if certificate is None and key is None and settings.tls_client_authorities is None:
        return TlsTexts()
    if certificate is None or key is None:
        missing = "--tls-certificate" if certificate is None else "--tls-key"
        raise CertificateError(f"{missing}: given nothing; TLS needs a certificate and its key")
    return TlsTexts(
        _text("--tls-certificate", certificate),
        _text("--tls-key", key),
        _text("--tls-client-authorities", settings.tls_client_authorities)
        if settings.tls_client_authorities
        else None,
    )


def context_of(settings: Settings) -> ssl.SSLContext:
    """The same certificate for what Python serves.

    Raises:
        CertificateError: the files cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load(context, settings)
    return context


def load(context: ssl.SSLContext, settings: Settings) -> None:
    """Let connections that begin from now on use the files as they are now.

    Raises:
        CertificateError: they cannot be used.
    """
    assert settings.tls_certificate is not None
    try:
        # A key that needs a password is refused, as the data plane does.
        context.load_cert_chain(settings.tls_certificate, settings.tls_key, password=lambda: "")
    except ssl.SSLError as error:
        wrong = "given keys that differ" if "MISMATCH" in str(error.reason) else "given others"
        chain, key = settings.tls_certificate, settings.tls_key
        raise CertificateError(
            f"--tls-certificate: {chain}, --tls-key: {key}: {wrong}; "
            "allowed: a certificate and its private key, PEM, without a password"
        ) from None
    except (OSError, ValueError) as error:
        raise CertificateError(f"--tls-certificate, --tls-key: {error}") from None


def _text(option: str, path: Path) -> str:
    try:
        return read_text(path, "a PEM file")
    except ValueError as error:
        raise CertificateError(f"{option}: {path}: {error}") from None
