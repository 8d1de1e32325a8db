"""Manifests that are not as they should be are refused with what is wrong, when they are read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from attnserve_client import AttentionClient, NotFoundError
from attnserve_proto.manifest import ManifestError, read

Change = Callable[[dict], object]
CPU = "CPUExecutionProvider"


def attention(**values: object) -> Change:
    return lambda content: content["attention"].update(values)


def picks(rows: object) -> Change:
    return lambda content: content["picks"].update({CPU: rows})


def row(up_to: object, variants: object) -> dict:
    return {"up_to": up_to, "variants": variants}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (attention(num_heads=-1), "attention.num_heads: -1; allowed: an integer, 1.."),
        (attention(num_heads=float("inf")), "attention.num_heads: inf"),
        (attention(head_dim="8"), "attention.head_dim: '8'"),
        (attention(window=0), "attention.window: 0"),
        (attention(window=2**40), "attention.window"),
        (attention(window_right=-3), "attention.window_right: -3; allowed: an integer, 0.."),
        (attention(alignment="middle"), "attention.alignment: 'middle'"),
        (attention(alibi="false"), "attention.alibi: 'false'; allowed: true, false"),
        (attention(rotary={"style": ["half"]}), "attention.rotary.style"),
        (attention(scale=float("nan")), "attention.scale: nan; allowed: a finite number, above 0"),
        (attention(scale=0), "attention.scale: 0"),
        (picks([row(float("inf"), [])]), "picks: up_to: inf"),
        (picks([row(9, []), row(5, [])]), "picks: up_to: 5 after 9; allowed: rising"),
        (picks([row(None, []), row(5, [])]), "picks: up_to: 5 after None"),
        (picks([row(None, "blocked")]), "picks: variants: 'blocked'; allowed: a list"),
        (lambda c: c["variants"][0].update(name="\ud800"), "variants: name"),
        (lambda c: c["variants"][0].update(native="no"), "native: 'no'; allowed: true, false"),
    ],
)
def test_what_is_wrong_is_named(
    repository: Path, tmp_path: Path, change: Change, message: str
) -> None:
    content = json.loads((repository / "causal/1/model.json").read_text())
    change(content)
    (tmp_path / "model.json").write_text(json.dumps(content))
    with pytest.raises(ManifestError) as refusal:
        read(tmp_path)
    assert message in str(refusal.value)


def transformer(**values: object) -> Change:
    return lambda content: content["transformer"].update(values)


def encoder(**values: object) -> Change:
    return lambda content: content["transformer"]["attentions"][0].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (transformer(max_seq_len=-1), "transformer.max_seq_len: -1; allowed: an integer, 0.."),
        (transformer(pad_token_id=40), "transformer.pad_token_id: 40; allowed: an integer, 0..39"),
        (transformer(pooling="median"), "transformer.pooling: 'median'; allowed: mean, cls, last"),
        (transformer(token_types=-1), "transformer.token_types: -1"),
        (transformer(texts={"max_len": 0}), "transformer.texts.max_len: 0"),
        (transformer(texts={"side": "top"}), "texts.side: 'top'; allowed: right, left"),
        (transformer(decoder_start_token_id=-1), "transformer.decoder_start_token_id: -1"),
        (encoder(name="middle"), "transformer.attentions: name: 'middle'; allowed: encoder"),
        (encoder(num_kv_heads=3), "encoder.num_kv_heads: 3; allowed: a divisor"),
        (encoder(mask="none"), "encoder.mask: 'none'"),
        (encoder(position_bias=1), "encoder.position_bias: 1; allowed: true, false"),
        (encoder(layers=[]), "encoder.layers: none"),
        (encoder(layers=[{"scale": 0}]), "encoder.layers: scale: 0; allowed: a finite number"),
        (encoder(layers=[{"scale": 1, "window": 0}]), "encoder.layers: window: 0"),
        (lambda c: c["transformer"]["attentions"].append(c["transformer"]["attentions"][0]),
         "encoder: twice"),
        (lambda c: c["transformer"]["attentions"][0].pop("layers"), "KeyError at 'layers'"),
    ],
)  # fmt: skip
def test_what_is_wrong_of_a_transformer_is_named(
    repository: Path, tmp_path: Path, change: Change, message: str
) -> None:
    content = json.loads((repository / "bert/1/model.json").read_text())
    change(content)
    (tmp_path / "model.json").write_text(json.dumps(content))
    with pytest.raises(ManifestError) as refusal:
        read(tmp_path)
    assert message in str(refusal.value)


def test_a_transformer_of_before_attentions_were_listed(repository: Path, tmp_path: Path) -> None:
    content = json.loads((repository / "bert/1/model.json").read_text())
    listed = content["transformer"].pop("attentions")
    del content["transformer"]["decoder_start_token_id"]
    (tmp_path / "model.json").write_text(json.dumps(content))
    (attention,) = read(tmp_path).transformer.attentions
    assert attention.name == "encoder"
    assert (attention.num_heads, len(attention.layers)) == (2, 3)
    assert attention.layers[0].scale == listed[0]["layers"][0]["scale"]


def test_no_nesting_is_too_deep(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("[" * 200_000)
    with pytest.raises(ManifestError, match="not JSON"):
        read(tmp_path)


def test_what_need_not_be_there(repository: Path, tmp_path: Path) -> None:
    content = json.loads((repository / "causal/1/model.json").read_text())
    for key in ("window", "window_right", "alignment", "alibi", "rotary", "softcap"):
        del content["attention"][key]
    content["picks"] = None
    (tmp_path / "model.json").write_text(json.dumps(content))
    manifest = read(tmp_path)
    assert manifest.attention.window is None
    assert manifest.attention.softcap == 0
    assert manifest.picks == {}


@pytest.mark.parametrize("version", ["9" * 5000, "0", "-1", "²", "7"])
def test_a_version_that_is_not_there(client: AttentionClient, version: str) -> None:
    with pytest.raises(NotFoundError, match="version: given"):
        client.get_model("causal", version=version)
