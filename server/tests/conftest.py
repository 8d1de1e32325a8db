"""Real models, written once, and a real server over them in this process."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from attnserve_client import AttentionClient
from attnserve_export.attention.layer import AttentionLayer, LayerConfig
from attnserve_export.models import seeded, seeded_multihead
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from attnserve_server.app import AttentionServer
from attnserve_server.settings import MIB, Limits, Settings
from handmade import attention, write_core, write_layer

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 6


@pytest.fixture(scope="session")
def repository(
    tmp_path_factory: pytest.TempPathFactory, export_all: Callable[[list[list[str]]], None]
) -> Path:
    """causal and grouped cores, two layers, and a tiny BERT."""
    folder = tmp_path_factory.mktemp("models")
    grouped = attention(HEADS, DIM, num_kv_heads=KV_HEADS, value_head_dim=VALUE_DIM)
    write_core(folder, "causal", attention(HEADS, DIM, mask="causal"))
    write_core(folder, "grouped", grouped, version=1)
    write_core(folder, "grouped", grouped, version=10)
    write_core(folder, "half", attention(HEADS, DIM), dtype="FP16")
    write_core(folder, "capped", attention(HEADS, DIM, softcap=5.0))
    self_attention = LayerConfig(attention(4, 8, mask="causal"), embed_dim=32, context_dim=None)
    write_layer(folder, "self", seeded(AttentionLayer, self_attention, 3))
    write_layer(folder, "cross", seeded_multihead(32, 4, 24, bias_terms=True, seed=3), mask="cross")
    checkpoint = tiny_bert(tmp_path_factory.mktemp("tiny-bert"))
    bert = ["--name", "bert", "--checkpoint", str(checkpoint)]
    export_all([["transformer", "--out", str(folder), *bert]])
    return folder


def tiny_bert(folder: Path) -> Path:
    """A random BERT with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=36,
        max_position_embeddings=20,
    )
    BertModel(config).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(36))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


LIMITS = Limits(
    max_message_bytes=4 * MIB,
    max_request_bytes=32 * MIB,
    max_response_bytes=16 * MIB,
    max_bytes_in_flight=48 * MIB,
    max_working_bytes=384 * MIB,
    max_seq_len=4096,
    max_batch=64,
    max_queue=4,
    max_stream_requests=4,
    chunk_bytes=64 << 10,
)


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[AttentionServer]:
    running = AttentionServer(
        Settings(repository, port=0, metrics_port=0, provider="cpu", drain_seconds=5, limits=LIMITS)
    )
    running.start()
    yield running
    running.drain()


@pytest.fixture(scope="session")
def address(server: AttentionServer) -> str:
    return f"127.0.0.1:{server.port}"


@pytest.fixture(scope="session")
def client(address: str) -> Iterator[AttentionClient]:
    with AttentionClient(address) as opened:
        yield opened


@pytest.fixture
def channel(address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(
        address, options=[("grpc.max_receive_message_length", -1)]
    ) as opened:
        yield opened


@pytest.fixture
def occupied(server: AttentionServer, channel: grpc.Channel) -> Iterator[None]:
    """The only slot to run in is taken, by a computation that nobody will wait for."""
    shape = [16, HEADS, 4096, DIM]
    tensor = pb.Tensor(dtype=pb.FP32, shape=shape)
    tensor.chunked.byte_size = int(np.prod(shape)) * 4
    request = pb.AttendRequest(
        model="causal",
        query=tensor,
        key=tensor,
        value=tensor,
        returns=pb.ReturnOptions(no_output=True, entropy=True, mass_by_distance=4096, top_k=4),
    )

    def messages() -> Iterator[pb.AttendStreamRequest]:
        yield pb.AttendStreamRequest(request_id=1, request=request)
        data = bytes(1 << 20)
        for field in (4, 5, 6):
            for offset in range(0, tensor.chunked.byte_size, len(data)):
                chunk = pb.TensorChunk(tensor=field, offset=offset, data=data)
                yield pb.AttendStreamRequest(request_id=1, chunk=chunk)
        until.wait(30)

    until = threading.Event()
    call = pb_grpc.AttentionServiceStub(channel).AttendStream(messages())
    deadline = time.monotonic() + 20
    while not server.plane.gauges()["running"] and time.monotonic() < deadline:
        time.sleep(0.005)
    assert server.plane.gauges()["running"]
    yield
    until.set()
    call.cancel()
    while server.plane.gauges()["running"] and time.monotonic() < deadline:
        time.sleep(0.005)
