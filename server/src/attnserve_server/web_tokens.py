"""JSON Web Tokens (RFC 7519), checked by PyJWT once each; the data plane keeps what came of it.

Signed by a private key whose public half this server has: RSA of 2,048 bits or more, ECDSA or
Ed25519. A key says by which algorithm it signs; the token's header may only choose among those.
"""

import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnserve_dataplane import DataPlane, Known, Request

from attnserve_server.callers import role_bits
from attnserve_server.errors import UnauthenticatedError
from attnserve_server.files import read_text
from attnserve_server.settings import ROLES, Settings, SettingsError

PATH = "/attnserve/CheckWebToken"
_LEEWAY = 30.0  # seconds by which clocks may differ
_LEAST_RSA_BITS = 2048
_MOST_KEYS, _MOST_BYTES = 64, 1 << 20
_MOST_NAME = 256
_BEGIN = "-----BEGIN PUBLIC KEY-----"

_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_CURVES = {"secp256r1": ("ES256",), "secp384r1": ("ES384",), "secp521r1": ("ES512",)}


class WebTokenError(SettingsError):
    """JSON Web Tokens cannot be checked as the settings ask; the message says why."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key, what tokens call it (empty: nothing), and the algorithms that it may be used by."""

    key: Any
    kid: str
    algorithms: tuple[str, ...]

    @property
    def name(self) -> str:
        """Another one for whatever differs in any of the three."""
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        form = PublicFormat.SubjectPublicKeyInfo
        digest = hashlib.sha256(self.key.public_bytes(Encoding.DER, form)).hexdigest()
        return f"{digest} {' '.join(self.algorithms)} {self.kid}"


def check_settings(settings: Settings) -> None:
    """See that whoever gives keys says for whom and by whom tokens must be, and has the library.

    Raises:
        WebTokenError: something is missing.
    """
    if settings.jwt_keys is None:
        return
    for option, value in (
        ("--jwt-issuer", settings.jwt_issuer),
        ("--jwt-audience", settings.jwt_audience),
    ):
        if not value:
            raise WebTokenError(
                f"{option}: given nothing; --jwt-keys needs it: else tokens that were made for "
                "others would do"
            )
    try:
        import cryptography  # noqa: F401
        import jwt  # noqa: F401
    except ImportError as error:
        raise WebTokenError(f"--jwt-keys: {error}; `pip install 'attnserve-server[jwt]'`") from None


def read_keys(path: Path) -> tuple[PublicKey, ...]:
    """The keys of a file: PEM, or a JSON Web Key Set (RFC 7517).

    Raises:
        WebTokenError: it cannot be read, or a key in it is of no use.
    """
    try:
        text = read_text(path, "PEM or JSON", _MOST_BYTES)
        keys = _of_json(text) if text.lstrip().startswith("{") else _of_pem(text)
    except Exception as error:  # of three libraries
        raise WebTokenError(f"--jwt-keys: {path}: {error}") from None
    if not 0 < len(keys) <= _MOST_KEYS:
        raise WebTokenError(f"--jwt-keys: {path}: given {len(keys)} keys; allowed: 1..{_MOST_KEYS}")
    return keys


def _of_pem(text: str) -> tuple[PublicKey, ...]:
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if "PRIVATE KEY" in text:
        raise ValueError("there is a private key in it; allowed: public ones")
    parts = text.split(_BEGIN)[1:]
    keys = (load_pem_public_key((_BEGIN + part).encode()) for part in parts)
    return tuple(PublicKey(key, "", _algorithms_of(key)) for key in keys)


def _of_json(text: str) -> tuple[PublicKey, ...]:
    from jwt import PyJWK

    found = []
    for entry in json.loads(text)["keys"]:
        if "d" in entry or "k" in entry:
            raise ValueError("there is a secret key in it; allowed: public ones")
        if entry.get("use", "sig") != "sig":
            continue
        key = PyJWK(entry).key
        algorithms = _algorithms_of(key)
        if "alg" in entry:
            algorithms = tuple(name for name in algorithms if name == entry["alg"])
        found.append(PublicKey(key, str(entry.get("kid", "")), algorithms))
    return tuple(found)


def _algorithms_of(key: Any) -> tuple[str, ...]:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    if isinstance(key, RSAPublicKey):
        if key.key_size < _LEAST_RSA_BITS:
            raise ValueError(
                f"an RSA key of {key.key_size} bits; allowed: {_LEAST_RSA_BITS} or more"
            )
        return _RSA
    if isinstance(key, EllipticCurvePublicKey) and key.curve.name in _CURVES:
        return _CURVES[key.curve.name]
    if isinstance(key, Ed25519PublicKey):
        return ("EdDSA",)
    raise ValueError("a key of another kind; allowed: RSA, ECDSA (P-256, P-384, P-521), Ed25519")


@dataclass(frozen=True, slots=True)
class Claims:
    """What a good token says: who, what it may do (bits), until when (seconds since 1970).

    Attributes:
        key: the name of that which has signed it.
    """

    name: str
    roles: int
    until: float
    key: str


def check(
    token: str, keys: Sequence[PublicKey], issuer: str, audience: str, roles_claim: str
) -> Claims:
    """Check signature, issuer, audience and times.

    Raises:
        UnauthenticatedError: the message says what is wrong with it, and repeats nothing of it.
    """
    import jwt

    try:
        header = jwt.get_unverified_header(token)
    except jwt.PyJWTError:
        raise _refusal("what is no JSON Web Token") from None
    algorithm, kid = header.get("alg"), header.get("kid")
    fitting = [
        key
        for key in keys
        if algorithm in key.algorithms and (kid is None or not key.kid or key.kid == kid)
    ]
    if not fitting:
        raise _refusal("a token by an algorithm or key that is none of this server's")
    for key in fitting:
        try:
            claims = jwt.decode(
                token,
                key.key,
                algorithms=[str(algorithm)],
                audience=audience,
                issuer=issuer,
                leeway=_LEEWAY,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.InvalidSignatureError:
            continue
        except jwt.ExpiredSignatureError:
            raise _refusal("a token that has run out") from None
        except jwt.ImmatureSignatureError:
            raise _refusal("a token that is not good yet") from None
        except jwt.InvalidAudienceError:
            raise _refusal("a token for another audience") from None
        except jwt.InvalidIssuerError:
            raise _refusal("a token of another issuer") from None
        except jwt.MissingRequiredClaimError:
            raise _refusal("a token that lacks one of exp, iss, aud, sub") from None
        except jwt.PyJWTError:
            raise _refusal("a token that is not as it should be") from None
        return _claims_of(claims, roles_claim, key.name)
    raise _refusal("a token that no key of this server has signed")


def _claims_of(claims: dict[str, Any], roles_claim: str, key: str) -> Claims:
    name = claims["sub"]
    if not isinstance(name, str) or not 0 < len(name) <= _MOST_NAME or not name.isprintable():
        raise _refusal(f"a token whose sub is no text of 1..{_MOST_NAME} characters")
    given = claims.get(roles_claim, ())
    words = given.replace(",", " ").split() if isinstance(given, str) else given
    known = {word for word in words if word in ROLES} if isinstance(words, (list, tuple)) else set()
    return Claims(f"jwt:{name}", role_bits(sorted(known)), float(claims["exp"]) + _LEEWAY, key)


def _refusal(given: str) -> UnauthenticatedError:
    return UnauthenticatedError(
        f"authorization: given {given}; allowed: Bearer and a token that this server knows"
    )


class WebTokens:
    """The keys in use, and the method that checks tokens by them. Any thread.

    Args:
        plane: that is told who is known.
        settings: with `jwt_keys`.

    Raises:
        WebTokenError: the keys cannot be used.
    """

    def __init__(self, plane: DataPlane, settings: Settings) -> None:
        assert settings.jwt_keys is not None
        assert settings.jwt_issuer is not None
        assert settings.jwt_audience is not None
        self._plane = plane
        self._path = settings.jwt_keys
        self._issuer, self._audience = settings.jwt_issuer, settings.jwt_audience
        self._claim = settings.jwt_roles_claim
        self._lock = threading.Lock()  # what was checked by old keys is not admitted under new ones
        self._keys = read_keys(self._path)

    def reload(self, known: list[Known]) -> None:
        """Read the keys again; arguments as those of `set_callers`.

        Raises:
            WebTokenError: the keys cannot be used; the former ones stay.
        """
        keys = read_keys(self._path)
        with self._lock:
            self._keys = keys
            self._tell(known)

    def set_callers(self, known: list[Known]) -> None:
        """Tell the data plane who is known.

        Args:
            known: by other credentials than web tokens.
        """
        with self._lock:
            self._tell(known)

    def _tell(self, known: list[Known]) -> None:
        self._plane.set_callers(known, [key.name for key in self._keys])

    def method(self, message: bytes, request: Request) -> bytes:
        """Answers the data plane about one token."""
        while True:
            keys = self._keys
            token = message.decode("ascii")
            claims = check(token, keys, self._issuer, self._audience, self._claim)
            with self._lock:
                if keys is self._keys:
                    self._plane.admit_web_token(
                        message, claims.name, claims.roles, claims.until, claims.key
                    )
                    return b""
