"""AttendTokens to decoders that attend to states which they are given."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
import transformers
from architectures import randomize
from attnserve_client import AttentionClient
from attnserve_client._cli import main
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from serving import serving
from transformers import BertConfig, BertModel

Array = np.ndarray[Any, Any]

WIDTH = 16


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, export_all: Callable[[list[list[str]]], None]
) -> Path:
    """A BERT that is a decoder over states, of 24 tokens at most."""
    folder = tmp_path_factory.mktemp("states")
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=50, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=24, is_decoder=True,
        add_cross_attention=True, bos_token_id=4,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    randomize(model)
    model.save_pretrained(folder / "checkpoint")
    given = ["--out", str(folder / "models"), "--checkpoint", str(folder / "checkpoint")]
    export_all([["transformer", "--name", "decoder", "--no-native", *given]])
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with serving(folder / "models") as server:
        yield f"127.0.0.1:{server.port}"


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[AttentionClient]:
    with AttentionClient(address) as opened:
        yield opened


def states(*lengths: int) -> list[Array]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal((length, WIDTH)).astype(np.float32) for length in lengths]


def test_what_a_decoder_makes_of_states_is_what_transformers_makes(
    client: AttentionClient, folder: Path
) -> None:
    model = transformers.AutoModel.from_pretrained(
        folder / "checkpoint", attn_implementation="eager"
    )
    # Longer than any target may be: states have no places here.
    given, targets = states(5, 1, 60), [[4, 7, 8], [4] * 20, [9]]
    for variant in client.get_model("decoder").variants:
        for attention, kept in (("decoder", "attentions"), ("cross", "cross_attentions")):
            result = client.attend_tokens(
                encoder_hidden_states=given, targets=targets, model="decoder",
                variant=variant.name, attention=attention, return_weights=True,
            )  # fmt: skip
            assert result.lengths == [5, 1, 60]
            assert result.target_ids == targets
            assert result.encoder_hidden is None
            for row, target in enumerate(targets):
                with torch.no_grad():
                    expected = model.double().eval()(
                        torch.tensor([target]),
                        encoder_hidden_states=torch.from_numpy(given[row])[None].double(),
                        output_attentions=True,
                    )
                np.testing.assert_allclose(
                    result.hidden[row], expected.last_hidden_state[0], atol=1e-4
                )
                maps = torch.stack(expected[kept])[:, 0]
                np.testing.assert_allclose(result.weights[row], maps, atol=1e-4)


def test_without_targets_it_reads_the_token_that_texts_begin_with(client: AttentionClient) -> None:
    whole = np.stack(states(3, 3))
    result = client.attend_tokens(encoder_hidden_states=whole, model="decoder")
    assert result.target_ids == [[4], [4]]
    assert [hidden.shape for hidden in result.hidden] == [(1, WIDTH)] * 2


def test_what_it_says_of_itself(client: AttentionClient) -> None:
    model = client.get_model("decoder")
    assert [(each.name, each.shape) for each in model.inputs] == [
        ("encoder_hidden_states", (None, WIDTH))
    ]
    assert ([each.name for each in model.attentions], model.takes_ids) == (
        ["decoder", "cross"],
        False,
    )


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (
            {"tokens": pb.TokenBatch(sequences=[pb.TokenSequence(ids=[1])])},
            grpc.StatusCode.FAILED_PRECONDITION,
            "reads no token ids; allowed: tensors: encoder_hidden_states",
        ),
        (
            {"target_tokens": pb.TokenBatch(sequences=[pb.TokenSequence(ids=[4] * 25)])},
            grpc.StatusCode.INVALID_ARGUMENT,
            "target_tokens.sequences[0]: given 25 tokens; allowed: 1..24 tokens",
        ),
        (
            {"target_tokens": pb.TokenBatch(sequences=[pb.TokenSequence(ids=[1])] * 2)},
            grpc.StatusCode.INVALID_ARGUMENT,
            "target_tokens.sequences: given 2 sequences; allowed: 1, one for each",
        ),
        (
            {"returns": pb.TokenReturnOptions(weights=True, attention="encoder")},
            grpc.StatusCode.INVALID_ARGUMENT,
            "returns.attention: given encoder; allowed: decoder, cross",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    address: str, given: dict[str, Any], code: grpc.StatusCode, message: str
) -> None:
    array = np.zeros((1, 3, WIDTH), np.float32)
    tensor = pb.Tensor(dtype=pb.FP32, shape=array.shape, data=array.tobytes())
    named = pb.InputTensor(name="encoder_hidden_states", tensor=tensor)
    tensors = [] if "tokens" in given else [named]
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        pb_grpc.AttentionServiceStub(channel).AttendTokens(
            pb.AttendTokensRequest(model="decoder", tensors=tensors, **given), timeout=20
        )
    assert caught.value.code() == code
    assert message in caught.value.details()


def test_the_commands_take_states_as_files(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, each in enumerate(states(6, 3)):
        np.save(tmp_path / f"{number}.npy", each)
    files = [f"--encoder-hidden-states={tmp_path / f'{number}.npy'}" for number in range(2)]
    at = ["--target", address]
    assert main([*at, "tokens", "--model", "decoder", *files, "--attention", "cross"]) == 0
    assert "layer 0: " in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert main([*at, "inspect", "--model", "decoder", *files, "--out", str(page)]) == 0
    meta = json.loads(re.search(r'id="meta">(.*?)</script>', page.read_text())[1])
    keys = [[len(each["keys"]) for each in sequence["maps"]] for sequence in meta["sequences"]]
    assert keys == [[1, 6], [1, 3]]
