"""Clients that others wrote; test_server_inference.py has tritonclient."""

import asyncio
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import attnserve_proto
import grpc
import pytest
import serving
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from attnserve_server.app import AttentionServer
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

CLIENTS = Path(__file__).with_name("clients")
PROTO = Path(attnserve_proto.__file__).parents[2]
GRPC_JS, PROTO_LOADER = "@grpc/grpc-js@1.14.7", "@grpc/proto-loader@0.8.1"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttentionServer]:
    repository = serving.write_causal(tmp_path_factory.mktemp("clients"))
    with serving.serving(repository) as running:
        yield running


@pytest.fixture(scope="module")
def address(server: AttentionServer) -> str:
    return f"127.0.0.1:{server.port}"


@pytest.fixture
def without_proxies() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}


def framed(content: bytes) -> bytes:
    return b"\0" + len(content).to_bytes(4, "big") + content


def needs(*commands: str) -> pytest.MarkDecorator:
    missing = [command for command in commands if shutil.which(command) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def test_grpcio(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.AttentionServiceStub(channel)
        request = serving.attend_request()
        for options in ({}, {"compression": grpc.Compression.Gzip}, {"wait_for_ready": True}):
            answer, call = stub.Attend.with_call(request, timeout=10, **options)
            assert answer.output.data == request.value.data
            assert call.code() == grpc.StatusCode.OK
        asked = [pb.AttendStreamRequest(request_id=n, request=request) for n in range(1, 9)]
        answers = list(stub.AttendStream(iter(asked), timeout=10))
        assert {answer.request_id for answer in answers} == set(range(1, 9))


async def calls_of_asyncio(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.AttentionServiceStub(channel)
        request = serving.attend_request()
        answers = await asyncio.gather(*(stub.Attend(request, timeout=10) for _ in range(32)))
        assert {answer.output.data for answer in answers} == {request.value.data}
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Attend(pb.AttendRequest(model="none"), timeout=10)
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND


def test_grpcio_of_asyncio(address: str) -> None:
    asyncio.run(calls_of_asyncio(address))


def curl_has_http2() -> bool:
    if shutil.which("curl") is None:
        return False
    shown = subprocess.run(["curl", "--version"], capture_output=True, text=True).stdout
    return "HTTP2" in shown


@pytest.mark.skipif(not curl_has_http2(), reason="no curl with HTTP/2 here")
@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        (serving.HEALTH_CHECK, b"", 0),
        (serving.LIST_MODELS, b"", 0),
        (serving.ATTEND, serving.attend_request(512).SerializeToString(), 0),
        (serving.ATTEND, pb.AttendRequest(model="none").SerializeToString(), 5),
    ],
)
def test_curl(
    address: str,
    tmp_path: Path,
    without_proxies: dict[str, str],
    path: str,
    content: bytes,
    status: int,
) -> None:
    (tmp_path / "in").write_bytes(framed(content))
    command = ["curl", "--http2-prior-knowledge", "-sS", "-m", "20", "-D", tmp_path / "headers"]
    command += ["-H", "content-type: application/grpc", "-H", "te: trailers"]
    command += ["--data-binary", f"@{tmp_path / 'in'}", "-o", tmp_path / "out"]
    subprocess.run([*command, f"http://{address}{path}"], check=True, env=without_proxies)
    told = (tmp_path / "headers").read_text().lower()
    assert told.startswith("http/2 200")
    assert re.search(r"^content-type: application/grpc", told, re.MULTILINE)
    assert re.search(rf"^grpc-status: {status}\b", told, re.MULTILINE)
    if status:
        assert re.search(r"^grpc-message: model: given 'none'", told, re.MULTILINE)
        return
    answer = (tmp_path / "out").read_bytes()
    assert framed(answer[5:]) == answer
    if path == serving.LIST_MODELS:
        assert pb.ListModelsResponse.FromString(answer[5:]).models[0].name == "causal"


@needs("h2load")
@pytest.mark.parametrize(
    ("path", "content"),
    [
        (serving.HEALTH_CHECK, b""),
        (serving.ATTEND, serving.attend_request(32).SerializeToString()),
    ],
)
def test_h2load(
    server: AttentionServer, address: str, tmp_path: Path, path: str, content: bytes
) -> None:
    def answered() -> int:
        return sum(
            count for method, code, count in server.plane.requests()
            if (method, code) == ("Attend", "OK")
        )  # fmt: skip

    before = answered()
    (tmp_path / "in").write_bytes(framed(content))
    command = ["h2load", "-n", "200", "-c", "4", "-m", "8", "-t", "1", "-d", tmp_path / "in"]
    command += ["-H", "content-type: application/grpc", "-H", "te: trailers"]
    done = subprocess.run(
        [*command, f"http://{address}{path}"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "200 succeeded, 0 failed, 0 errored, 0 timeout" in done.stdout
    assert answered() - before == (200 if path == serving.ATTEND else 0)


@pytest.fixture(scope="session")
def kept(pytestconfig: pytest.Config) -> Path:
    """A folder for what takes long to make; it outlives the run."""
    assert pytestconfig.cache is not None
    return pytestconfig.cache.mkdir("clients")


def cpp_client(kept: Path) -> Path:
    """The C++ client, compiled."""
    sources = [CLIENTS / "attend.cc", PROTO / "attnserve/v1/attention.proto"]
    content = b"".join(source.read_bytes() for source in sources)
    program = kept / f"attend-{hashlib.sha256(content).hexdigest()[:16]}"
    if program.exists():
        return program
    folder = program.with_suffix(f".{os.getpid()}")
    folder.mkdir(exist_ok=True)
    plugin = f"--plugin=protoc-gen-grpc={shutil.which('grpc_cpp_plugin')}"
    generate = ["protoc", plugin, f"-I{PROTO}", f"--cpp_out={folder}", f"--grpc_out={folder}"]
    subprocess.run([*generate, "attnserve/v1/attention.proto"], check=True)
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "grpc++", "protobuf"],
        check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    made = sorted(folder.rglob("*.cc"))
    command = ["g++", "-std=c++17", "-O0", f"-I{folder}", CLIENTS / "attend.cc", *made, *flags]
    subprocess.run([*command, "-o", folder / "attend"], check=True)
    (folder / "attend").rename(program)
    shutil.rmtree(folder)
    return program


def has_grpc_cpp() -> bool:
    commands = ("g++", "protoc", "grpc_cpp_plugin", "pkg-config")
    if not all(map(shutil.which, commands)):
        return False
    return subprocess.run(["pkg-config", "--exists", "grpc++"]).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not has_grpc_cpp(), reason="libgrpc++-dev is not installed")
def test_grpc_cpp(address: str, kept: Path, without_proxies: dict[str, str]) -> None:
    done = subprocess.run(
        [cpp_client(kept), address],
        capture_output=True, text=True, timeout=60, env=without_proxies,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "all well\n", "")


def node_modules(kept: Path) -> Path:
    """A folder with grpc-js in it."""
    folder = kept / f"{GRPC_JS}-{PROTO_LOADER}".replace("/", "-").replace("@", "")
    if not (folder / "ready").exists():
        folder.mkdir(exist_ok=True)
        install = ["npm", "install", "--no-audit", "--no-fund", "--prefix", folder]
        done = subprocess.run([*install, GRPC_JS, PROTO_LOADER], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"npm cannot install {GRPC_JS} here: {done.stderr[-300:]}")
        (folder / "ready").touch()
    return folder


@pytest.mark.slow
@needs("node", "npm")
def test_grpc_js(address: str, kept: Path, without_proxies: dict[str, str]) -> None:
    folder = node_modules(kept)
    shutil.copy(CLIENTS / "attend.js", folder)
    done = subprocess.run(
        ["node", folder / "attend.js", address, PROTO],
        capture_output=True, text=True, timeout=60, env=without_proxies,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "all well\n", "")


def test_what_kserves_client_sends(address: str) -> None:
    # KServe's own client (0.21) cannot be installed beside this project: it needs protobuf below 7.
    # What it sends (kserve/protocol/infer_type.py, InferRequest.to_grpc): raw contents, and their
    # size once more among the parameters of each input; for an output, whether it may come raw.
    request = oip.ModelInferRequest(model_name="causal", id="0f3c")
    asked = serving.attend_request()
    for name in ("query", "key", "value"):
        tensor = getattr(asked, name)
        given = request.inputs.add(name=name, datatype="FP32", shape=tensor.shape)
        given.parameters["binary_data_size"].int64_param = len(tensor.data)
        request.raw_input_contents.append(tensor.data)
    request.parameters["binary_data_output"].bool_param = True
    request.outputs.add(name="output").parameters["binary_data"].bool_param = True
    with grpc.insecure_channel(address) as channel:
        stub = oip_grpc.GRPCInferenceServiceStub(channel)
        answer = stub.ModelInfer(request, timeout=10, metadata=[("x-request-id", "1")])
    assert list(answer.raw_output_contents) == [asked.value.data]
    assert answer.id == "0f3c"
