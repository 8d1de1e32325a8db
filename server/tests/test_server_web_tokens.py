"""JSON Web Tokens: whose are good, whose are not, and keys that change meanwhile."""

import base64
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import jwt
import numpy as np
import pytest
import serving
from attnserve_client import AttentionClient
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from attnserve_server import web_tokens
from attnserve_server.app import AttentionServer
from attnserve_server.errors import UnauthenticatedError
from attnserve_server.settings import Settings
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

ISSUER, AUDIENCE = "https://issuer.example", "attnserve"
SIGNERS: dict[str, Any] = {
    "RS256": rsa.generate_private_key(65537, 2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "ES384": ec.generate_private_key(ec.SECP384R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
SIGNERS["PS256"] = SIGNERS["RS256"]
STRANGER = ec.generate_private_key(ec.SECP256R1())
YEAR_2000, YEAR_2100 = 946_684_800, 4_102_444_800
Code = grpc.StatusCode


def pem(*keys: Any) -> str:
    return "".join(
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
        for key in keys
    )


def claims(**others: Any) -> dict[str, Any]:
    now = int(time.time())
    said = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "roles": ["infer"], "exp": now + 600}
    return {name: value for name, value in (said | others).items() if value is not None}


def token(algorithm: str = "ES256", key: Any = None, kid: str = "", **others: Any) -> str:
    headers = {"kid": kid} if kid else None
    return jwt.encode(claims(**others), key or SIGNERS[algorithm], algorithm, headers=headers)


def unsigned(header: dict[str, Any], said: dict[str, Any], signature: bytes = b"x") -> str:
    def part(content: bytes) -> str:
        return base64.urlsafe_b64encode(content).rstrip(b"=").decode()

    return ".".join(map(part, (json.dumps(header).encode(), json.dumps(said).encode(), signature)))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[web_tokens.PublicKey, ...]:
    path = tmp_path_factory.mktemp("keys") / "keys.pem"
    path.write_text(pem(*(SIGNERS[name] for name in ("RS256", "ES256", "ES384", "EdDSA"))))
    return web_tokens.read_keys(path)


def check(given: str, keys: tuple[web_tokens.PublicKey, ...]) -> web_tokens.Claims:
    return web_tokens.check(given, keys, ISSUER, AUDIENCE, "roles")


# One token


@pytest.mark.parametrize("algorithm", SIGNERS)
def test_good_tokens(algorithm: str, keys: tuple[web_tokens.PublicKey, ...]) -> None:
    found = check(token(algorithm, roles=["infer", "admin", "else"]), keys)
    assert found.name == "jwt:alice"
    assert found.roles == 1 | 4
    assert time.time() + 500 < found.until < time.time() + 700
    assert check(token(algorithm, roles="sessions infer"), keys).roles == 1 | 2
    assert check(token(algorithm, roles=None), keys).roles == 0
    assert check(token(algorithm, roles={"infer": 1}), keys).roles == 0
    assert check(token(algorithm, aud=["others", AUDIENCE]), keys).roles == 1


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"exp": YEAR_2000}, "has run out"),
        ({"nbf": YEAR_2100}, "is not good yet"),
        ({"iat": YEAR_2100}, "is not good yet"),
        ({"aud": "others"}, "another audience"),
        ({"iss": "https://others.example"}, "another issuer"),
        ({"exp": None}, "lacks one of"),
        ({"aud": None}, "lacks one of"),
        ({"iss": None}, "lacks one of"),
        ({"sub": None}, "lacks one of"),
        ({"sub": ""}, "sub is no text"),
        ({"sub": "a\nb"}, "sub is no text"),
        ({"sub": "a" * 300}, "sub is no text"),
        ({"exp": "soon"}, "given a token"),
    ],
)
def test_tokens_whose_claims_are_not_good(
    others: dict[str, Any], said: str, keys: tuple[web_tokens.PublicKey, ...]
) -> None:
    with pytest.raises(UnauthenticatedError, match=said) as refused:
        check(token(**others), keys)
    assert "others" not in str(refused.value)


def test_tokens_whose_signature_is_not_good(keys: tuple[web_tokens.PublicKey, ...]) -> None:
    good = token("ES256")
    head, body, signature = good.split(".")
    public = pem(SIGNERS["RS256"])
    secret = base64.urlsafe_b64encode(public.encode()).decode()
    wrong = [
        token(key=STRANGER),
        f"{head}.{body}.{signature[:-2]}AA",
        f"{head}.{token(sub='mallory').split('.')[1]}.{signature}",
        unsigned({"alg": "none"}, claims(), b""),
        unsigned({"alg": "none"}, claims()),
        # The public key as the secret of a symmetric one.
        jwt.encode(claims(), secret, "HS256"),
        unsigned({"alg": "HS256"}, claims()),
        unsigned({"alg": "ES384"}, claims()),
        unsigned({"alg": ["ES256"]}, claims()),
        unsigned({}, claims()),
        "a.b.c",
        "",
        f"{good}.{signature}",
    ]
    for each in wrong:
        with pytest.raises(UnauthenticatedError):
            check(each, keys)
    assert check(good, keys)


@given(st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), max_size=200))
def test_texts_that_are_no_tokens(text: str) -> None:
    with pytest.raises(UnauthenticatedError):
        check(text, ())


# Keys


def jwk(key: Any, **others: str) -> dict[str, Any]:
    kinds = {rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
             ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm}  # fmt: skip
    algorithm = next(made for kind, made in kinds.items() if isinstance(key, kind))
    return json.loads(algorithm.to_jwk(key.public_key())) | others


def test_a_key_set_names_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    first, second = SIGNERS["ES256"], STRANGER
    encryption = jwk(SIGNERS["RS256"], use="enc")
    path.write_text(
        json.dumps({"keys": [jwk(first, kid="1"), jwk(second, kid="2", alg="ES256"), encryption]})
    )
    keys = web_tokens.read_keys(path)
    assert [key.kid for key in keys] == ["1", "2"]
    assert check(token(key=first, kid="1"), keys)
    assert check(token(key=second, kid="2"), keys)
    assert check(token(key=second), keys)
    for wrong in (token(key=second, kid="1"), token(key=first, kid="3"), token("RS256")):
        with pytest.raises(UnauthenticatedError):
            check(wrong, keys)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "given 0 keys"),
        ("no key", "given 0 keys"),
        ("{}", "keys"),
        ("{", "keys.pem"),
        ('{"keys": []}', "given 0 keys"),
        ('{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}', "a secret key"),
        ("-----BEGIN PUBLIC KEY-----\nrubbish\n-----END PUBLIC KEY-----\n", "keys.pem"),
        (pem(rsa.generate_private_key(65537, 1024)), "an RSA key of 1024 bits"),
        (pem(ec.generate_private_key(ec.SECP256K1())), "a key of another kind"),
        (
            STRANGER.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ).decode(),
            "a private key",
        ),
    ],
)
def test_files_of_keys_that_are_of_no_use(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.pem"
    path.write_text(text)
    with pytest.raises(web_tokens.WebTokenError, match=re.escape(said)) as refused:
        web_tokens.read_keys(path)
    assert "c2VjcmV0" not in str(refused.value)


def test_issuer_and_audience_must_be_given(tmp_path: Path) -> None:
    settings = {"jwt_keys": tmp_path, "jwt_issuer": ISSUER, "jwt_audience": AUDIENCE}
    web_tokens.check_settings(Settings(tmp_path, **settings))
    for name in ("jwt_issuer", "jwt_audience"):
        for nothing in (None, ""):
            with pytest.raises(web_tokens.WebTokenError, match=f"--{name.replace('_', '-')}"):
                web_tokens.check_settings(Settings(tmp_path, **settings | {name: nothing}))


# A server


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.write_causal(tmp_path_factory.mktemp("web-tokens"))


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("server-keys") / "keys.pem"
    path.write_text(pem(SIGNERS["ES256"]))
    return path


@pytest.fixture(scope="module")
def server(repository: Path, key_file: Path) -> Iterator[AttentionServer]:
    options = {"jwt_keys": key_file, "jwt_issuer": ISSUER, "jwt_audience": AUDIENCE}
    with serving.serving(repository, **options) as running:
        yield running


@pytest.fixture
def channel(server: AttentionServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as opened:
        yield opened


def metadata(given: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {given}"),)


def attend(channel: grpc.Channel, given: str, length: int = 8) -> grpc.StatusCode:
    stub = pb_grpc.AttentionServiceStub(channel)
    try:
        stub.Attend(serving.attend_request(length), timeout=30, metadata=metadata(given))
    except grpc.RpcError as error:
        return error.code()
    return Code.OK


def test_a_token_lets_in_and_is_checked_once(
    channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []
    original = web_tokens.check

    def noting(given: str, *others: Any) -> web_tokens.Claims:
        checked.append(given)
        return original(given, *others)

    monkeypatch.setattr(web_tokens, "check", noting)
    good = token()
    for _ in range(5):
        assert attend(channel, good) is Code.OK
    assert checked == [good]
    wrong = token(key=STRANGER)
    for _ in range(3):
        assert attend(channel, wrong) is Code.UNAUTHENTICATED
    assert checked == [good] + [wrong] * 3


def test_roles_of_tokens(channel: grpc.Channel) -> None:
    assert attend(channel, token(roles=["admin"])) is Code.PERMISSION_DENIED
    assert attend(channel, token(roles=[])) is Code.PERMISSION_DENIED
    stub = oip_grpc.GRPCInferenceServiceStub(channel)
    request = oip.ModelStatisticsRequest()
    stub.ModelStatistics(request, metadata=metadata(token(roles=["admin"])))
    with pytest.raises(grpc.RpcError) as refused:
        stub.ModelStatistics(request, metadata=metadata(token()))
    assert refused.value.code() is Code.PERMISSION_DENIED


def test_large_bodies_and_streams_that_come_before_the_check(channel: grpc.Channel) -> None:
    assert attend(channel, token(jti="large"), length=4096) is Code.OK
    assert attend(channel, token(key=STRANGER), length=4096) is Code.UNAUTHENTICATED
    stub = pb_grpc.AttentionServiceStub(channel)
    requests = [
        pb.AttendStreamRequest(request_id=number, request=serving.attend_request())
        for number in range(1, 4)
    ]
    answers = stub.AttendStream(iter(requests), metadata=metadata(token(jti="stream")))
    assert [answer.request_id for answer in answers] == [1, 2, 3]
    assert list(stub.AttendStream(iter(()), metadata=metadata(token(jti="none")))) == []
    with pytest.raises(grpc.RpcError) as refused:
        list(stub.AttendStream(iter(requests), metadata=metadata(token(key=STRANGER))))
    assert refused.value.code() is Code.UNAUTHENTICATED
    query = np.ones((1, serving.HEADS, 4, serving.DIM), np.float32)
    with AttentionClient(
        f"127.0.0.1:{channel._channel.target().decode().rpartition(':')[2]}",
        metadata=dict(metadata(token(jti="sdk"))),
    ) as client:
        assert client.attend(query, query, query, model="causal").output.shape == query.shape


def test_many_new_tokens_at_once(server: AttentionServer) -> None:
    """All are answered: let in, refused, or told to come again, and none is taken for another."""
    codes: list[tuple[bool, grpc.StatusCode]] = []

    def call(number: int) -> None:
        good = number % 2 == 0
        given = token(jti=str(number), key=None if good else STRANGER)
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as own:
            codes.append((good, attend(own, given)))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(codes) == 40
    assert {code for good, code in codes if good} <= {Code.OK, Code.RESOURCE_EXHAUSTED}
    assert {code for good, code in codes if not good} <= {
        Code.UNAUTHENTICATED,
        Code.RESOURCE_EXHAUSTED,
    }


def test_keys_are_read_again_when_they_change(channel: grpc.Channel, key_file: Path) -> None:
    old, new = token(jti="old"), token(key=STRANGER, jti="new")
    assert attend(channel, old) is Code.OK
    key_file.write_text(pem(STRANGER))
    assert serving.eventually(lambda: attend(channel, new) is Code.OK)
    assert attend(channel, old) is Code.UNAUTHENTICATED  # though it was good before
    key_file.write_text(pem(SIGNERS["ES256"], STRANGER))
    assert serving.eventually(lambda: attend(channel, old) is Code.OK)
    assert attend(channel, new) is Code.OK


def test_a_stream_ends_with_its_token_and_with_the_key_that_signed_it(
    channel: grpc.Channel, key_file: Path
) -> None:
    over = threading.Event()

    def waiting() -> Iterator[pb.AttendStreamRequest]:
        yield pb.AttendStreamRequest(request_id=1, request=serving.attend_request())
        over.wait(60)

    def opened(given: str) -> Any:
        stub = pb_grpc.AttentionServiceStub(channel)
        call = stub.AttendStream(waiting(), metadata=metadata(given), timeout=60)
        assert next(call).request_id == 1
        return call

    key_file.write_text(pem(SIGNERS["ES256"], STRANGER))
    assert serving.eventually(lambda: attend(channel, token(key=STRANGER)) is Code.OK)
    try:
        stays, short = opened(token(jti="stays")), opened(token(exp=int(time.time()) - 28))
        revoked = opened(token(key=STRANGER, jti="revoked"))
        assert serving.eventually(lambda: short.done())
        assert short.code() is Code.UNAUTHENTICATED
        assert not revoked.done()
        key_file.write_text(pem(SIGNERS["ES256"]))
        assert serving.eventually(lambda: revoked.done())
        assert revoked.code() is Code.UNAUTHENTICATED
        assert not stays.done()
    finally:
        over.set()
    list(stays)
    assert stays.code() is Code.OK


def test_a_token_that_runs_out_is_good_no_longer(channel: grpc.Channel) -> None:
    # Clocks may differ by 30 s.
    short = token(exp=int(time.time()) - 28)
    assert attend(channel, short) is Code.OK
    assert serving.eventually(lambda: attend(channel, short) is Code.UNAUTHENTICATED)
