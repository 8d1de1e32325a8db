"""AttendTokens over real gRPC, against Hugging Face transformers."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from attnserve_client import AttentionClient, AttnserveError, InvalidArgumentError
from tokenizers import Tokenizer
from transformers import BertModel

SEQUENCES = [[2, 5, 6, 7, 3], [2, 3], [2, 11, 12, 13, 14, 15, 16, 17, 3]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BertModel:
    """The checkpoint behind the `bert` model: the same seed gives the same parameters."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(
        "fixtures", Path(__file__).with_name("conftest.py")
    )
    fixtures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fixtures)
    folder = fixtures.tiny_bert(tmp_path_factory.mktemp("again"))
    return BertModel.from_pretrained(folder, attn_implementation="eager").eval()


def test_ragged_batches_give_what_each_sequence_gives_alone(
    client: AttentionClient, model: BertModel
) -> None:
    result = client.attend_tokens(SEQUENCES, model="bert", return_weights=True)
    for row, ids in enumerate(SEQUENCES):
        with torch.no_grad():
            expected = model(torch.tensor([ids]), output_attentions=True)
        np.testing.assert_allclose(result.hidden[row], expected.last_hidden_state[0], atol=1e-4)
        maps = torch.stack(expected.attentions)[:, 0]  # (L, H, S, S)
        np.testing.assert_allclose(result.weights[row], maps, atol=1e-4)
    assert result.ids == SEQUENCES
    assert result.tokens[0] == ["[CLS]", "w1", "w2", "w3", "[SEP]"]


def test_layers_and_heads_come_in_the_order_asked_for(client: AttentionClient) -> None:
    everything = client.attend_tokens(SEQUENCES[:1], model="bert", return_weights=True).weights[0]
    some = client.attend_tokens(SEQUENCES[:1], model="bert", layers=[2, 0], heads=[1])
    assert (some.layers, some.heads) == ([2, 0], [1])
    np.testing.assert_allclose(some.weights[0], everything[[2, 0]][:, [1]], atol=1e-6)


def test_text_is_tokenized_with_the_special_tokens(client: AttentionClient) -> None:
    result = client.attend_tokens(["w3 w4", "nothing known"], model="bert")
    assert result.tokens == [["[CLS]", "w3", "w4", "[SEP]"], ["[CLS]", "[UNK]", "[UNK]", "[SEP]"]]


def test_truncation_keeps_the_special_tokens_and_says_so(client: AttentionClient) -> None:
    long = " ".join(["w1"] * 50)
    with pytest.raises(AttnserveError, match=r"text.texts\[0\]: given 52 tokens; allowed: 1..20"):
        client.attend_tokens([long], model="bert")
    result = client.attend_tokens([long, "w2"], model="bert", truncate=True)
    assert result.truncated == [True, False]
    assert len(result.ids[0]) == 20
    assert (result.tokens[0][0], result.tokens[0][-1]) == ("[CLS]", "[SEP]")


def test_entropy_without_weights(client: AttentionClient) -> None:
    result = client.attend_tokens(SEQUENCES, model="bert", return_entropy=True, return_hidden=False)
    assert result.weights is None
    assert result.hidden is None
    assert [entropy.shape for entropy in result.entropy] == [(3, 2, 5), (3, 2, 2), (3, 2, 9)]


def test_text_and_its_ids_give_the_same(client: AttentionClient, repository: Path) -> None:
    ids = Tokenizer.from_file(str(repository / "bert/1/tokenizer.json")).encode("w3 w9").ids
    by_text = client.attend_tokens(["w3 w9"], model="bert")
    by_ids = client.attend_tokens([ids], model="bert")
    np.testing.assert_array_equal(by_text.hidden[0], by_ids.hidden[0])


def test_a_long_text_is_cut_or_refused_before_it_is_tokenized(client: AttentionClient) -> None:
    text = "w1 " * (1 << 20)
    started = time.monotonic()
    assert client.attend_tokens([text], model="bert", truncate=True).truncated == [True]
    with pytest.raises(InvalidArgumentError, match=r"text\.texts\[0\]: given"):
        client.attend_tokens([text], model="bert")
    assert time.monotonic() - started < 5
