"""Real models, exported once, and a real server over them in this process."""

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import torch
from attnserve_client import AttentionClient
from attnserve_server.app import AttentionServer
from attnserve_server.settings import MIB, Limits, Settings

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 6


@pytest.fixture(scope="session")
def repository(
    tmp_path_factory: pytest.TempPathFactory, export_all: Callable[[list[list[str]]], None]
) -> Path:
    """causal and grouped cores, two layers, and a tiny BERT."""
    folder = tmp_path_factory.mktemp("models")
    out = ["--out", str(folder)]
    core = ["core", *out, "--num-heads", str(HEADS), "--head-dim", str(DIM)]
    grouped = [*core, "--name", "grouped", "--num-kv-heads", str(KV_HEADS)]
    grouped += ["--value-head-dim", str(VALUE_DIM)]
    crossed = ["--mask", "cross", "--context-dim", "24", "--module", "multihead"]
    layer = ["layer", *out, "--num-heads", "4", "--embed-dim", "32", "--seed", "3"]
    checkpoint = tiny_bert(tmp_path_factory.mktemp("checkpoint"))
    commands = [
        [*core, "--name", "causal", "--mask", "causal"],
        [*grouped, "--version", "1"],
        [*grouped, "--version", "10"],
        [*core, "--name", "half", "--dtype", "fp16"],
        [*core, "--name", "capped", "--softcap", "5"],
        [*layer, "--name", "self", "--mask", "causal"],
        [*layer, "--name", "cross", *crossed],
        ["transformer", *out, "--name", "bert", "--checkpoint", str(checkpoint)],
    ]
    export_all(commands)
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
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
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
