"""AttendTokens over tensors that are no token ids: pictures, sounds, embeddings."""

import asyncio
import json
import re
import threading
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
import transformers
import typed_inputs
from attnserve_client import (
    AsyncAttentionClient,
    AttentionClient,
    FailedPreconditionError,
    InvalidArgumentError,
)
from attnserve_client._cli import main
from attnserve_client.transformers import attend_images, attend_sounds
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from PIL import Image
from serving import serving

ExportAll = Callable[[list[list[str]]], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, export_all: ExportAll) -> Path:
    """A ViT, a Whisper and a BERT that takes embeddings, each tiny and random."""
    folder = tmp_path_factory.mktemp("tensors")
    typed_inputs.export(folder, export_all)
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with serving(folder / "models") as server:
        yield f"127.0.0.1:{server.port}"


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[AttentionClient]:
    with AttentionClient(address) as opened:
        yield opened


def eager(folder: Path, name: str) -> Any:
    """The checkpoint in float64."""
    loaded = transformers.AutoModel.from_pretrained(
        folder / "checkpoints" / name, attn_implementation="eager"
    )
    return loaded.double().eval()


def random(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_pictures_give_what_transformers_makes_of_them(
    client: AttentionClient, folder: Path
) -> None:
    pixels = random(3, 3, 24, 16)
    with torch.no_grad():
        expected = eager(folder, "vit")(torch.from_numpy(pixels).double(), output_attentions=True)
    for variant in client.get_model("vit").variants:
        result = client.attend_tokens(
            pixel_values=torch.from_numpy(pixels), model="vit", variant=variant.name,
            return_weights=True, return_entropy=True,
        )  # fmt: skip
        assert result.variant == variant.name
        for row in range(3):
            np.testing.assert_allclose(
                result.hidden[row], expected.last_hidden_state[row], atol=1e-4
            )
            maps = torch.stack(expected.attentions)[:, row]
            np.testing.assert_allclose(result.weights[row], maps, atol=1e-4)
        assert result.lengths == [7, 7, 7]
        assert result.ids == [[], [], []]
        assert result.tokens[0] == ["[CLS]", "0,0", "0,1", "1,0", "1,1", "2,0", "2,1"]
        assert result.source is not None
        assert result.source.patches is not None
        assert (result.source.patches.rows, result.source.patches.columns) == (3, 2)
        np.testing.assert_array_equal(result.given, pixels)


def test_sounds_are_read_by_an_encoder_and_told_by_a_decoder(
    client: AttentionClient, folder: Path
) -> None:
    features, targets = random(2, 8, 20, seed=1), [[3, 11, 12], [3, 13]]
    model = eager(folder, "whisper")
    for name, kept in (("cross", "cross_attentions"), ("encoder", "encoder_attentions")):
        result = client.attend_tokens(
            {"input_features": features}, targets=targets, model="whisper", attention=name,
            return_weights=True,
        )  # fmt: skip
        for row, target in enumerate(targets):
            with torch.no_grad():
                expected = model(
                    torch.from_numpy(features[row : row + 1]).double(),
                    decoder_input_ids=torch.tensor([target]),
                    output_attentions=True,
                )
            np.testing.assert_allclose(result.hidden[row], expected.last_hidden_state[0], atol=1e-4)
            np.testing.assert_allclose(
                result.encoder_hidden[row], expected.encoder_last_hidden_state[0], atol=1e-4
            )
            maps = torch.stack(expected[kept])[:, 0]
            np.testing.assert_allclose(result.weights[row], maps, atol=1e-4)
    assert result.lengths == [10, 10]
    assert result.target_ids == targets
    assert result.source is not None
    assert (result.source.frames_per_token, result.source.tokens) == (2, 10)


def test_embeddings_give_what_their_ids_give(client: AttentionClient, folder: Path) -> None:
    sequences = [[2, 5, 6, 7, 3], [2, 3], [2, 11, 12, 13, 14, 15, 16, 3]]
    table = eager(folder, "bert").get_input_embeddings().weight.detach().float().numpy()
    by_ids = client.attend_tokens(sequences, model="bert", return_weights=True)
    by_embeds = client.attend_tokens(
        inputs_embeds=[table[ids] for ids in sequences], model="bert", return_weights=True
    )
    assert by_ids.variant == by_embeds.variant.removesuffix("_embeds")
    assert by_embeds.lengths == by_ids.lengths == [5, 2, 8]
    for row in range(3):
        np.testing.assert_allclose(by_embeds.hidden[row], by_ids.hidden[row], atol=1e-5)
        np.testing.assert_allclose(by_embeds.weights[row], by_ids.weights[row], atol=1e-5)
    whole = client.attend_tokens(inputs_embeds=table[[[2, 5, 3]]], model="bert")
    np.testing.assert_allclose(
        whole.hidden[0], client.attend_tokens([[2, 5, 3]], model="bert").hidden[0], atol=1e-5
    )


def test_requests_of_several_callers_share_a_run_and_keep_their_own(
    address: str, folder: Path
) -> None:
    model = eager(folder, "vit")
    failures: list[str] = []

    def call(seed: int) -> None:
        pixels = random(1 + seed % 3, 3, 24, 16, seed=seed)
        with torch.no_grad():
            expected = model(torch.from_numpy(pixels).double()).last_hidden_state
        with AttentionClient(address) as own:
            for _ in range(5):
                result = own.attend_tokens(pixel_values=pixels, model="vit")
                together.append(result.timings.batch_size)
                for row, hidden in enumerate(result.hidden):
                    if not np.allclose(hidden, expected[row], atol=1e-4):
                        failures.append(f"{seed}: row {row}")

    together: list[int] = []
    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(together) == 40


def test_the_asyncio_client_takes_the_same(address: str) -> None:
    async def ask() -> Any:
        async with AsyncAttentionClient(address) as client:
            return await client.attend_tokens(pixel_values=random(1, 3, 24, 16), model="vit")

    assert asyncio.run(ask()).hidden[0].shape == (7, 16)


def test_models_say_what_they_take(client: AttentionClient) -> None:
    vit, whisper, bert = (client.get_model(name) for name in ("vit", "whisper", "bert"))
    assert (vit.takes_ids, whisper.takes_ids, bert.takes_ids) == (False, False, True)
    assert [(entry.name, entry.shape) for entry in vit.inputs] == [("pixel_values", (3, 24, 16))]
    assert [(entry.name, entry.shape) for entry in bert.inputs] == [("inputs_embeds", (None, 32))]


def test_arguments_that_do_not_go_together_are_not_sent(client: AttentionClient) -> None:
    with pytest.raises(TypeError, match="given nothing to read; allowed: one of inputs, pixel"):
        client.attend_tokens(model="vit")
    with pytest.raises(TypeError, match="given inputs and pixel_values"):
        client.attend_tokens(["a"], pixel_values=random(1, 3, 24, 16), model="vit")
    with pytest.raises(ValueError, match=r"inputs_embeds: given \[S, 2\] float32 and \[S, 3\]"):
        client.attend_tokens(inputs_embeds=[random(1, 2), random(1, 3)], model="bert")
    with pytest.raises(TypeError, match="pixel_values: "):
        client.attend_tokens(pixel_values="cat.jpg", model="vit")


def tensor(name: str, array: np.ndarray[Any, Any], **changed: Any) -> pb.InputTensor:
    lengths = changed.pop("lengths", [])
    content = {"dtype": pb.FP32, "shape": array.shape, "data": array.tobytes()} | changed
    return pb.InputTensor(name=name, tensor=pb.Tensor(**content), lengths=lengths)


PICTURE = np.zeros((1, 3, 24, 16), np.float32)
EMBEDS = np.zeros((2, 5, 32), np.float32)
NOT_FINITE = PICTURE.copy()
NOT_FINITE[0, 1, 2, 3] = np.nan

REFUSED: dict[str, tuple[str, Any, grpc.StatusCode, str]] = {
    "another name": (
        "vit", [tensor("input_features", PICTURE)], grpc.StatusCode.INVALID_ARGUMENT,
        "tensors[0].name: given 'input_features'; allowed: pixel_values",
    ),
    "two": (
        "vit", [tensor("pixel_values", PICTURE)] * 2, grpc.StatusCode.INVALID_ARGUMENT,
        "tensors: given 2 of them; allowed: one of pixel_values",
    ),
    "another dtype": (
        "vit", [tensor("pixel_values", PICTURE, dtype=pb.FP16)], grpc.StatusCode.INVALID_ARGUMENT,
        "tensors[0].tensor (pixel_values).dtype: given FP16; allowed: FP32",
    ),
    "another size": (
        "vit", [tensor("pixel_values", PICTURE, shape=[1, 3, 16, 24])],
        grpc.StatusCode.INVALID_ARGUMENT,
        "tensors[0].tensor (pixel_values).shape: given [1, 3, 16, 24]; allowed: [B, 3, 24, 16]",
    ),
    "no batch": (
        "vit", [tensor("pixel_values", PICTURE, shape=[3, 24, 16])],
        grpc.StatusCode.INVALID_ARGUMENT, "allowed: [B, 3, 24, 16]",
    ),
    "an empty batch": (
        "vit", [tensor("pixel_values", PICTURE, shape=[0, 3, 24, 16])],
        grpc.StatusCode.INVALID_ARGUMENT, "given 0 sequences; allowed: 1..",
    ),
    "bytes too few": (
        "vit", [tensor("pixel_values", PICTURE, data=bytes(8))], grpc.StatusCode.INVALID_ARGUMENT,
        "(pixel_values).data: given 8 bytes; allowed: 4608 bytes, as shape [1, 3, 24, 16] takes",
    ),
    "a stored tensor": (
        "vit",
        [pb.InputTensor(name="pixel_values",
                        tensor=pb.Tensor(dtype=pb.FP32, shape=PICTURE.shape, stored="x"))],
        grpc.StatusCode.INVALID_ARGUMENT, "given stored; allowed: the elements themselves",
    ),
    "NaN": (
        "vit", [tensor("pixel_values", NOT_FINITE)], grpc.StatusCode.INVALID_ARGUMENT,
        "(pixel_values)[0, 1, 2, 3]: given nan; allowed: finite numbers",
    ),
    "lengths of a picture": (
        "vit", [tensor("pixel_values", PICTURE, lengths=[7])], grpc.StatusCode.INVALID_ARGUMENT,
        "tensors[0].lengths: given 1 of them; allowed: none: pixel_values has no padding",
    ),
    "ids beside it": (
        "bert", [tensor("inputs_embeds", EMBEDS)], grpc.StatusCode.INVALID_ARGUMENT,
        "input: given tokens and tensors; allowed: one of the two",
    ),
    "too many lengths": (
        "bert", [tensor("inputs_embeds", EMBEDS, lengths=[5])], grpc.StatusCode.INVALID_ARGUMENT,
        "tensors[0].lengths: given 1 of them; allowed: 2, one for each sequence",
    ),
    "a length of 0": (
        "bert", [tensor("inputs_embeds", EMBEDS, lengths=[5, 0])],
        grpc.StatusCode.INVALID_ARGUMENT, "tensors[0].lengths[1]: given 0; allowed: 1..5",
    ),
    "another width": (
        "bert", [tensor("inputs_embeds", EMBEDS, shape=[2, 4, 40])],
        grpc.StatusCode.INVALID_ARGUMENT, "allowed: [B, S, 32]",
    ),
    "embeddings too long": (
        "bert", [tensor("inputs_embeds", np.zeros((1, 65, 32), np.float32))],
        grpc.StatusCode.INVALID_ARGUMENT, "given 65 tokens; allowed: 1..64 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_tensor_that_does_not_fit_is_refused_by_its_field(address: str, case: str) -> None:
    model, tensors, code, message = REFUSED[case]
    ids = pb.TokenBatch(sequences=[pb.TokenSequence(ids=[1])]) if "beside" in case else None
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        pb_grpc.AttentionServiceStub(channel).AttendTokens(
            pb.AttendTokensRequest(model=model, tensors=tensors, tokens=ids), timeout=20
        )
    assert caught.value.code() == code
    assert message in caught.value.details()


def test_what_a_model_does_not_read_is_refused(client: AttentionClient, address: str) -> None:
    with pytest.raises(
        FailedPreconditionError, match="tokens: model vit reads no token ids; allowed: tensors: pix"
    ):
        client.attend_tokens([[1, 2]], model="vit")
    with pytest.raises(InvalidArgumentError, match=r"tensors\[0\].name: given 'pixel_values'"):
        client.attend_tokens(pixel_values=PICTURE, model="bert")
    with pytest.raises(FailedPreconditionError, match="variant"):
        client.attend_tokens([[1, 2]], model="bert", variant="fused_embeds")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture, its pixels as .npy, and a second of sound."""
    folder = tmp_path_factory.mktemp("files")
    pixels = np.random.default_rng(3).integers(0, 256, (48, 40, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "cat.png")
    np.save(folder / "cat.npy", random(3, 24, 16))
    np.save(folder / "flat.npy", random(24, 16))
    samples = np.sin(np.arange(16000) * 0.1) * 20000
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 16000, "NONE", ""))
        file.writeframes(samples.astype("<i2").tobytes())
    return folder


def test_a_picture_is_made_ready_as_the_checkpoint_says(
    client: AttentionClient, folder: Path, files: Path
) -> None:
    processor = transformers.AutoImageProcessor.from_pretrained(folder / "checkpoints/vit")
    picture = Image.open(files / "cat.png").convert("RGB")
    expected = processor(images=picture, return_tensors="np")["pixel_values"]
    assert expected.shape == (1, 3, 24, 16)
    for images in (files / "cat.png", [picture], np.asarray(picture)):
        result = attend_images(client, images, model="vit")
        np.testing.assert_allclose(result.given, expected, atol=1e-6)
    by_hand = client.attend_tokens(pixel_values=expected, model="vit")
    np.testing.assert_allclose(result.hidden[0], by_hand.hidden[0], atol=1e-6)
    given = attend_images(client, picture, model="vit", processor=processor)
    np.testing.assert_allclose(given.given, expected, atol=1e-6)
    with pytest.raises(ValueError, match="model: whisper takes no pixel_values; allowed: input_fe"):
        attend_images(client, picture, model="whisper")


def test_a_sound_is_made_ready_as_the_checkpoint_says(
    client: AttentionClient, folder: Path
) -> None:
    sound = random(9000, seed=4) * np.float32(0.1)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder / "checkpoints/whisper")
    expected = extractor(sound, sampling_rate=16000, return_tensors="np")["input_features"]
    result = attend_sounds(client, sound, sampling_rate=16000, model="whisper", targets=[[3, 4]])
    np.testing.assert_allclose(result.given, expected, atol=1e-5)
    assert result.target_ids == [[3, 4]]
    with pytest.raises(ValueError, match="16000"):
        attend_sounds(client, sound, sampling_rate=8000, model="whisper")


def test_the_commands_take_files(
    address: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--target", address]
    assert main([*at, "info"]) == 0
    shown = capsys.readouterr().out
    assert "takes pixel_values [B, 3, 24, 16] as 7 tokens, 3 x 2 patches" in shown
    assert "takes token ids; inputs_embeds [B, S, 32]" in shown
    out = tmp_path / "vit.npz"
    tokens = [*at, "tokens", "--model", "vit", "--output", str(out)]
    assert main([*tokens, "--pixel-values", str(files / "cat.npy"), "--query", "1,0"]) == 0
    assert re.search(r"1,0  layer 0: \S+ 0\.\d\d", capsys.readouterr().out)
    assert np.load(out)["weights_0"].shape == (2, 2, 7, 7)
    picture = ["--pixel-values", str(files / "cat.png")]
    assert main([*tokens, *picture, "--no-weights"]) == 0
    assert "[CLS] 0,0 0,1 1,0 1,1 2,0 2,1" in capsys.readouterr().out
    sound = ["--input-features", str(files / "a.wav")]
    assert main([*at, "tokens", "--model", "whisper", *sound, "--attention", "cross"]) == 0
    assert "layer 1: " in capsys.readouterr().out
    page = tmp_path / "page.html"
    for model, read in (("vit", picture), ("whisper", sound)):
        assert main([*at, "inspect", "--model", model, *read, "--out", str(page)]) == 0
        meta = json.loads(re.search(r'id="meta">(.*?)</script>', page.read_text())[1])
        [sequence] = meta["sequences"]
        assert sequence["seen"]["kind"] == ("picture" if model == "vit" else "sound")
        assert len(sequence["maps"]) == (1 if model == "vit" else 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pixel-values", "missing.npy"], "--pixel-values: given "),
        (["--pixel-values", "flat.npy"], "with shape [24, 16]; allowed: 3 dimensions, or 4"),
        (["--pixel-values", "a.wav"], "--pixel-values: "),
        (["--pixel-values", "cat.npy", "w1"], "given more than one; allowed: one of them"),
        (["--pixel-values", "cat.npy", "--inputs-embeds", "flat.npy"], "given together"),
        (["--inputs-embeds", "cat.png"], "allowed: .npy with [tokens, width]"),
        (["--input-features", "cat.png"], "allowed: .wav of 16 bits, or .npy"),
        (["--processor", "."], "--processor: given without a picture or a sound"),
        ([], "given none; allowed: one of them"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    address: str,
    files: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(files / each) if "." in each[1:] else each for each in arguments]
    assert main(["--target", address, "tokens", "--model", "vit", *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
