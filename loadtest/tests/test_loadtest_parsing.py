from argparse import ArgumentTypeError

import pytest
from attnserve_client import Limits, Model, ServerInfo, Variant
from attnserve_loadtest import parsing
from attnserve_loadtest.errors import LoadTestError
from attnserve_loadtest.payloads import (
    AttendPayload,
    TokensPayload,
    check_request,
    make_payload,
    row_name,
)


def model(kind: str, **changes: object) -> Model:
    facts: dict[str, object] = {
        "name": "m",
        "version": "1",
        "kind": kind,
        "dtype": "FP32",
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "value_head_dim": 16,
        "mask": "causal",
        "window": 0,
        "scale": 0.0,
        "softcap": 0.0,
        "embed_dim": 32,
        "num_layers": 1,
        "vocab_size": 100,
        "max_seq_len": 0,
        "takes_text": False,
        "variants": (Variant("fused", (), (), (), 0.0, 0.0),),
        "source": "",
    }
    return Model(**(facts | changes))  # type: ignore[arg-type]


SERVER = ServerInfo("attnserve", "1", "1", (), Limits(0, 1 << 20, 0, 4096, 8, 0, 0), "serving")


def test_lengths_are_sorted_and_unique() -> None:
    assert parsing.seq_lens("256, 64,64") == (64, 256)


@pytest.mark.parametrize("text", ["", "0", "-1", "a", "64,x", "1.5"])
def test_bad_lengths_are_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError):
        parsing.seq_lens(text)


@pytest.mark.parametrize("text", ["127.0.0.1:1", "grpc://127.0.0.1:1", "http://127.0.0.1:1/"])
def test_target_is_host_and_port(text: str) -> None:
    assert parsing.target(text) == "127.0.0.1:1"


@pytest.mark.parametrize("text", ["", "localhost", "host:port", "host:99999", ":80"])
def test_target_without_host_or_port_is_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError):
        parsing.target(text)


def test_core_payload_has_the_models_shapes_and_dtype() -> None:
    payload = make_payload(model("core", dtype="FP16"), 10, batch=3)
    assert isinstance(payload, AttendPayload)
    shapes = {name: tensor.shape for name, tensor in payload.tensors.items()}
    assert shapes == {"query": (3, 4, 10, 8), "key": (3, 2, 10, 8), "value": (3, 2, 10, 16)}
    assert {str(tensor.dtype) for tensor in payload.tensors.values()} == {"float16"}


def test_layer_payload_has_hidden_states_and_a_context_for_cross_attention() -> None:
    cross = model("layer", mask="cross", manifest='{"layer": {"context_dim": 48}}')
    payload = make_payload(cross, 10)
    assert isinstance(payload, AttendPayload)
    shapes = {name: tensor.shape for name, tensor in payload.tensors.items()}
    assert shapes == {"hidden_states": (1, 10, 32), "context": (1, 10, 48)}


def test_transformer_payload_has_ids_of_the_vocabulary() -> None:
    payload = make_payload(model("transformer"), 50, batch=2)
    assert isinstance(payload, TokensPayload)
    assert [len(ids) for ids in payload.ids] == [50, 50]
    assert all(0 <= each < 100 for ids in payload.ids for each in ids)


def test_same_seed_gives_the_same_payload() -> None:
    one, two = (make_payload(model("transformer"), 20, seed=5) for _ in range(2))
    assert one == two
    assert make_payload(model("transformer"), 20, seed=6) != one


def test_row_name_has_model_variant_and_length() -> None:
    assert row_name("causal", "fused", 512) == "causal/fused/seq_len=512"
    assert row_name("causal", "", 512) == "causal/auto/seq_len=512"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"variant": "nope"}, "no variant 'nope'; it has: fused"),
        ({"seq_lens": [64, 8192]}, "seq_len 8192 is over the max_seq_len of the server, 4096"),
        ({"batch": 9}, "batch 9 is over the max_batch of the server, 8"),
        ({"seq_lens": [4096]}, "needs 1,310,720 bytes a request"),
    ],
)
def test_what_the_server_would_refuse_is_refused_before(
    asked: dict[str, object], message: str
) -> None:
    arguments = {"variant": "", "seq_lens": [64], "batch": 1} | asked
    with pytest.raises(LoadTestError, match=message):
        check_request(model("core"), SERVER, **arguments)  # type: ignore[arg-type]


def test_length_over_the_models_limit_is_refused() -> None:
    with pytest.raises(LoadTestError, match="max_seq_len of model 'm', 512"):
        check_request(
            model("transformer", max_seq_len=512), SERVER, variant="", seq_lens=[1024], batch=1
        )
