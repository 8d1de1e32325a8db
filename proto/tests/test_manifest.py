"""What is written of a manifest is read again; what a newer exporter writes beside it is let be."""

import dataclasses
import json
from pathlib import Path

import pytest
from attnserve_proto import manifest as manifests
from attnserve_proto.manifest import (
    Attention,
    CaseResult,
    FileEntry,
    Manifest,
    ManifestError,
    Pick,
    RotaryEmbedding,
    TensorEntry,
    Transformer,
    TransformerAttention,
    TransformerLayer,
    VariantEntry,
    Verification,
)

FOLDER = Path("models/some/7")
VARIANT = VariantEntry(
    name="fused",
    file="model.onnx",
    inputs=(TensorEntry("input_ids", "INT64", ("batch", "seq_len")),),
    outputs=(TensorEntry("last_hidden_state", "FP32", ("batch", "seq_len", 32)),),
    providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
    memory="linear",
    native=True,
    verification=Verification(
        reference="another implementation",
        seed=2**32 - 1,
        tolerance=1e-4,
        max_abs_error={"last_hidden_state": 3.1e-6, "pooled": 4e-6},
        cases=(CaseResult("random", {"batch": 2, "seq_len": 9}, 4e-6, 1e-4),),
    ),
)
MANIFEST = Manifest(
    name="some",
    version=7,
    kind="transformer",
    dtype="FP32",
    opset=23,
    attention=Attention(
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        value_head_dim=8,
        mask="causal",
        window=128,
        rotary=RotaryEmbedding("half", 8, 10000.0),
        scale=0.35,
    ),
    transformer=Transformer(
        family="some",
        num_layers=2,
        hidden_size=32,
        vocab_size=100,
        max_seq_len=0,
        pad_token_id=3,
        pooling="last",
        normalize_pooled=True,
        attentions=(
            TransformerAttention(
                name="decoder",
                num_heads=4,
                num_kv_heads=2,
                head_dim=8,
                mask="causal",
                layers=(TransformerLayer(0.35, 128), TransformerLayer(0.35)),
            ),
        ),
    ),
    tokenizer="tokenizer.json",
    variants=(VARIANT,),
    picks={"CPUExecutionProvider": (Pick(1024, ("fused",)), Pick(None, ()))},
    tuned={"CPUExecutionProvider": {"date": "2026-01-01"}},
    files={"model.onnx": FileEntry("ab" * 32, 1234), "tokenizer.json": FileEntry("cd" * 32, 5)},
    source={"description": "made by hand, é語", "seed": 0},
    created_by={"hand": "1"},
)


def test_what_is_written_is_read_again() -> None:
    assert manifests.parse(FOLDER, manifests.encode(MANIFEST)) == MANIFEST


def test_unknown_variants_and_keys_are_let_be() -> None:
    content = json.loads(manifests.encode(MANIFEST))
    content["facts_to_come"] = content["attention"]["more"] = [1, {"a": None}]
    later = content["variants"][0] | {"name": "paged", "page_size": 16, "caches": ["FP16", "INT8"]}
    content["variants"].append(later)
    read = manifests.parse(FOLDER, json.dumps(content))
    assert read.variants == (VARIANT, dataclasses.replace(VARIANT, name="paged"))
    assert dataclasses.replace(read, variants=MANIFEST.variants) == MANIFEST


@pytest.mark.parametrize("key", ["name", "attention", "variants", "source", "opset"])
def test_what_is_missing_is_named(key: str) -> None:
    content = json.loads(manifests.encode(MANIFEST))
    del content[key]
    with pytest.raises(ManifestError, match=f"{FOLDER}/model.json: KeyError at '{key}'"):
        manifests.parse(FOLDER, json.dumps(content))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"text"', "[" * 200_000])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(ManifestError, match=r"model\.json"):
        manifests.parse(FOLDER, text)


def test_another_version_of_the_format_is_refused() -> None:
    text = manifests.encode(MANIFEST).replace('"manifest_version": 1', '"manifest_version": 2')
    with pytest.raises(ManifestError, match="manifest_version: 2; allowed: 1"):
        manifests.parse(FOLDER, text)


def test_files_lie_in_the_versions_folder() -> None:
    files = {**MANIFEST.files, "../other": FileEntry("", 0)}
    text = manifests.encode(dataclasses.replace(MANIFEST, files=files))
    with pytest.raises(ManifestError, match=r"files: '../other' is not a plain file name"):
        manifests.parse(FOLDER, text)
