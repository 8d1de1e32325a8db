"""A version that does not load keeps no other from being served, and says why it is not."""

import asyncio
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from attnserve_client import (
    AsyncAttentionClient,
    AttentionClient,
    FailedPreconditionError,
    NotFoundError,
    UnavailableModel,
)
from attnserve_client._cli import main
from attnserve_proto.manifest import ManifestError
from serving import serving
from tritonclient.utils import InferenceServerException

Q = np.ones((1, 4, 3, 8), np.float32)


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def emptied(version: Path) -> None:
    shutil.rmtree(version)
    version.mkdir()


def a_file(version: Path) -> None:
    shutil.rmtree(version)
    version.touch()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "an empty folder": (emptied, "bad/1/model.json: No such file"),
    "a file": (a_file, "bad/1/model.json: Not a directory"),
    "no manifest": (lambda v: (v / "model.json").unlink(), "bad/1/model.json: No such file"),
    "half a manifest": (lambda v: cut(v / "model.json"), "bad/1/model.json: not JSON"),
    "no graph": (lambda v: (v / "model.onnx").unlink(), "bad/1/model.onnx: listed in model.json"),
    "half a graph": (lambda v: cut(v / "model.onnx"), "bad/1/model.onnx: "),
    "another graph": (lambda v: changed(v / "model.onnx"), "bad/1/model.onnx: SHA-256"),
}


@pytest.fixture
def folder(repository: Path, tmp_path: Path) -> Path:
    """A good model and one to damage."""
    for name in ("good", "bad"):
        shutil.copytree(repository / "causal/1", tmp_path / name / "1")
        manifest = tmp_path / name / "1/model.json"
        manifest.write_text(manifest.read_text().replace('"causal"', f'"{name}"', 1))
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_others_are_served(
    folder: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    inflict, reason = DAMAGES[damage]
    inflict(folder / "bad/1")
    with serving(folder) as server, AttentionClient(f"127.0.0.1:{server.port}") as client:
        np.testing.assert_allclose(client.attend(Q, Q, Q, model="good").output, 1, atol=1e-6)
        assert [model.name for model in client.list_models()] == ["good"]
        [listed] = client.server_info().unavailable
        assert (listed.name, listed.version) == ("bad", "1")
        assert listed.reason.startswith(reason)
        assert str(folder) not in listed.reason
        for call in (
            lambda: client.attend(Q, Q, Q, model="bad", timeout=5),
            lambda: client.get_model("bad", timeout=5),
        ):
            with pytest.raises(FailedPreconditionError, match="model: bad is not served: bad/1"):
                call()
        with pytest.raises(NotFoundError, match="models here: good"):
            client.attend(Q, Q, Q, model="none")
        assert main(["--target", f"127.0.0.1:{server.port}", "info"]) == 0
        assert f"bad version 1: not served: {listed.reason}" in capsys.readouterr().out

        async def ask() -> tuple[UnavailableModel, ...]:
            async with AsyncAttentionClient(f"127.0.0.1:{server.port}") as opened:
                return (await opened.server_info()).unavailable

        assert asyncio.run(ask()) == (listed,)


@pytest.fixture
def control(folder: Path) -> Iterator[triton.InferenceServerClient]:
    (folder / "bad/1/model.json").unlink()
    with (
        serving(folder) as server,
        triton.InferenceServerClient(f"127.0.0.1:{server.port}") as opened,
    ):
        yield opened


def states(client: triton.InferenceServerClient) -> dict[str, tuple[str, str]]:
    index = client.get_model_repository_index().models
    return {f"{entry.name}/{entry.version}": (entry.state, entry.reason) for entry in index}


def test_the_index_and_readiness_tell_them_apart(control: triton.InferenceServerClient) -> None:
    assert control.is_server_ready()
    assert control.is_model_ready("good")
    assert not control.is_model_ready("bad")
    assert not control.is_model_ready("bad", "1")
    found = states(control)
    assert found["good/1"] == ("READY", "")
    assert found["bad/1"] == ("UNAVAILABLE", "bad/1/model.json: No such file or directory")


def test_it_is_loaded_once_it_is_mended(
    control: triton.InferenceServerClient, folder: Path
) -> None:
    with pytest.raises(InferenceServerException, match=r"bad/1/model\.json: No such") as raised:
        control.load_model("bad")
    assert raised.value.status() == "StatusCode.FAILED_PRECONDITION"
    text = (folder / "good/1/model.json").read_text().replace('"good"', '"bad"', 1)
    (folder / "bad/1/model.json").write_text(text)
    control.load_model("bad")
    assert control.is_model_ready("bad")
    assert states(control)["bad/1"] == ("READY", "")


def test_a_damaged_version_beside_a_good_one(
    control: triton.InferenceServerClient, folder: Path, repository: Path
) -> None:
    """The good one serves on; the model is not ready, as its highest version is what it means."""
    (folder / "good/2").mkdir()
    with pytest.raises(InferenceServerException, match=r"good/2/model\.json: No such"):
        control.load_model("good")
    assert control.is_model_ready("good", "1")
    assert not control.is_model_ready("good", "2")
    assert not control.is_model_ready("good")
    found = states(control)
    assert found["good/1"] == ("READY", "")
    assert found["good/2"] == ("UNAVAILABLE", "good/2/model.json: No such file or directory")
    (folder / "good/2").rmdir()
    control.load_model("good")
    assert control.is_model_ready("good")
    assert "good/2" not in states(control)


def test_versions_that_load_are_served_from_the_start(folder: Path) -> None:
    (folder / "good/7").mkdir()
    with serving(folder) as server, AttentionClient(f"127.0.0.1:{server.port}") as client:
        assert client.attend(Q, Q, Q, model="good").version == "1"
        [listed] = client.server_info().unavailable
        assert (listed.name, listed.version) == ("good", "7")
        with pytest.raises(NotFoundError, match="versions of good: 1"):
            client.attend(Q, Q, Q, model="good", version=7)


def test_a_server_that_could_serve_nothing_does_not_start(folder: Path) -> None:
    for name in ("good", "bad"):
        emptied(folder / name / "1")
    message = r"no model loads: bad/1/model\.json: .*, and 1 more"
    with pytest.raises(ManifestError, match=message), serving(folder):
        pass
