"""`generate` with attention and KV cache in a server, compared with transformers' eager attention.

Parameters and prompts are of fixed seeds: where two tokens are nearly as likely, rounding alone
decides between them, and chance would sooner or later draw such a case.
"""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import attnserve_client.transformers as served
import pytest
import torch
import transformers
from attnserve_client import FailedPreconditionError
from attnserve_client._transformers_service import TARGET_VARIABLE, current
from attnserve_export import cli
from attnserve_server.app import AttentionServer
from handmade import attention, write_core
from serving import eventually, serving

pytestmark = pytest.mark.needs_library

VOCABULARY, WINDOW = 97, 9
HEADS, KV_HEADS, DIM = 4, 2, 8
LENGTHS = (3, 17, 1, 30)
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


def decoder(config: str, **others: Any) -> Callable[[], Any]:
    """A configuration of three layers."""
    given: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HEADS * DIM,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "intermediate_size": 48,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "tie_word_embeddings": False,  # tied ones would repeat their input
    }
    if config == "GPT2Config":
        for lacking in ("num_key_value_heads", "head_dim", "intermediate_size"):
            del given[lacking]
    return lambda: getattr(transformers, config)(**given | others)


FAMILIES = {
    "llama": decoder("LlamaConfig"),
    "qwen3": decoder("Qwen3Config"),
    "mistral": decoder("MistralConfig", sliding_window=WINDOW),
    "gpt2": decoder("GPT2Config"),
    "gpt-oss": decoder(
        "GptOssConfig",
        sliding_window=WINDOW,
        layer_types=MIXED,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "gemma3": decoder(
        "Gemma3TextConfig", sliding_window=WINDOW, layer_types=MIXED, query_pre_attn_scalar=20
    ),
    # Others of their kind: a scale of each layer's own; a window in some layers; a softcap.
    "gpt2 scaled": decoder("GPT2Config", scale_attn_by_inverse_layer_idx=True),
    "qwen2": decoder(
        "Qwen2Config", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "gemma2": decoder(
        "Gemma2Config", sliding_window=WINDOW, query_pre_attn_scalar=8, attn_logit_softcapping=2.0
    ),
}


@dataclass(frozen=True)
class Pair:
    """One model twice: with eager attention here, and with the server's."""

    local: Any
    remote: Any


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttentionServer]:
    folder = tmp_path_factory.mktemp("models")
    grouped = attention(HEADS, DIM, num_kv_heads=KV_HEADS, mask="causal")
    write_core(folder, "grouped", grouped)
    # The first by name, and none that fits: sinks are the caller's.
    write_core(folder, "a-sunk", replace(grouped, sinks=(9.0,) * HEADS))
    write_core(folder, "bf16", grouped, dtype="BF16")
    write_core(folder, "each", attention(HEADS, DIM, mask="causal"))
    write_core(
        folder,
        "capped",
        attention(HEADS, DIM, num_kv_heads=KV_HEADS, mask="causal", softcap=2.0),
    )
    with serving(folder) as running:
        served.connect(f"127.0.0.1:{running.port}")
        yield running


@pytest.fixture(scope="module")
def pair(
    server: AttentionServer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Pair]:
    """Makes the two of a family, once."""
    made: dict[str, Pair] = {}

    def make(family: str) -> Pair:
        if family not in made:
            folder = tmp_path_factory.mktemp("checkpoint")
            write_checkpoint(family, folder)
            made[family] = Pair(load(folder, "eager"), load(folder, "attnserve"))
        return made[family]

    return make


def write_checkpoint(family: str, folder: Path) -> None:
    """Random parameters, larger than those that training starts from."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
        elif "sinks" in name:
            torch.nn.init.normal_(parameter, std=2.0)
        elif "bias" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)


def load(folder: Path, attn_implementation: str, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=attn_implementation, **options
    ).eval()


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 2) -> dict[str, torch.Tensor]:
    """A batch, padded at the left."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(2, VOCABULARY, (len(lengths), longest), generator=generator)
    places = torch.arange(longest)
    mask = (places >= longest - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model: Any, tokens: int, **options: Any) -> Any:
    return model.generate(
        **prompts() | options,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
    )


def check_generation(pair: Pair, tokens: int, **options: Any) -> None:
    local, remote = (generate(model, tokens, **options) for model in (pair.local, pair.remote))
    assert isinstance(remote.cache, served.SessionCache)
    assert not isinstance(local.cache, served.SessionCache)
    assert len(local.sequences[:, -tokens:].unique()) > 10
    assert torch.equal(local.sequences, remote.sequences)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_ragged_prompts_are_those_of_eager(
    family: str, pair: Callable[[str], Pair]
) -> None:
    check_generation(pair(family), 24)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gpt-oss"])
def test_beams_are_those_of_eager(family: str, pair: Callable[[str], Pair]) -> None:
    check_generation(pair(family), 12, num_beams=3, num_return_sequences=2)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_long_generations_are_those_of_eager(family: str, pair: Callable[[str], Pair]) -> None:
    check_generation(pair(family), 200)
    check_generation(pair(family), 100, num_beams=4)


def test_padding_is_not_sent_and_sessions_end_with_the_cache(
    server: AttentionServer, pair: Callable[[str], Pair]
) -> None:
    def sessions() -> float:
        return server.plane.kv_sessions()["sessions"]

    assert eventually(lambda: sessions() == 0)
    result = generate(pair("llama").remote, 5)
    cache = result.cache
    assert [session.length for session in cache.sessions] == [length + 4 for length in LENGTHS]
    assert cache.get_seq_length() == max(LENGTHS) + 4
    assert all(layer.keys is None and layer.values is None for layer in cache.layers)
    assert sessions() == len(LENGTHS)
    del result, cache
    assert eventually(lambda: sessions() == 0)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt-oss"])
def test_logits_without_a_cache(family: str, pair: Callable[[str], Pair]) -> None:
    given = prompts()
    with torch.no_grad():
        local, remote = (
            model(**given, use_cache=False).logits
            for model in (pair(family).local, pair(family).remote)
        )
    real = given["attention_mask"].bool()
    torch.testing.assert_close(remote[real], local[real], rtol=1e-4, atol=1e-4)


def test_bf16(server: AttentionServer, tmp_path: Path) -> None:
    write_checkpoint("llama", tmp_path)
    given = prompts()
    with torch.no_grad():
        local, remote = (
            load(tmp_path, name, dtype=torch.bfloat16)(**given).logits
            for name in ("eager", "attnserve")
        )
    assert remote.dtype == torch.bfloat16
    real = given["attention_mask"].bool()
    torch.testing.assert_close(remote[real], local[real], rtol=0.1, atol=0.3)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_cache_carries_a_conversation_on(family: str, pair: Callable[[str], Pair]) -> None:
    more = torch.randint(2, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(3))

    def talk(model: Any) -> list[torch.Tensor]:
        first = generate(model, 6)
        ids = torch.cat([first.sequences, more], 1)
        mask = torch.cat([prompts()["attention_mask"], torch.ones(4, 12, dtype=torch.long)], 1)
        fork = copy.deepcopy(first.cache)
        said = []
        for cache in (first.cache, fork):
            turn = generate(model, 6, input_ids=ids, attention_mask=mask, cache=cache)
            said.append(turn.sequences)
        return said

    local, remote = talk(pair(family).local), talk(pair(family).remote)
    assert torch.equal(remote[0], remote[1])
    assert torch.equal(local[0], remote[0])


def test_rows_are_selected_repeated_and_cut(pair: Callable[[str], Pair]) -> None:
    token = torch.tensor([[5], [6], [7]])

    def go_on(model: Any) -> torch.Tensor:
        with torch.no_grad():
            cache = model(**prompts(), use_cache=True).cache
            cache.batch_select_indices(torch.tensor([3, 1]))
            cache.batch_repeat_interleave(2)
            cache.reorder_cache(torch.tensor([3, 0, 0, 1]))
            cache.batch_select_indices(torch.tensor([True, False, True, True]))
            cache.crop(-15)
            mask = prompts()["attention_mask"][[1, 3, 3], :-15]
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
            logits: torch.Tensor = model(
                token, attention_mask=mask, cache=cache, position_ids=mask.sum(1, True) - 1
            ).logits
            return logits

    both = pair("llama")
    torch.testing.assert_close(go_on(both.remote), go_on(both.local), rtol=1e-4, atol=1e-4)


def test_an_assistant_gives_the_same_tokens(pair: Callable[[str], Pair]) -> None:
    given = {"input_ids": prompts((11,))["input_ids"], "attention_mask": None}
    both = pair("llama")
    alone = generate(both.local, 24, **given).sequences
    for assistant in ({"assistant_model": pair("qwen3").remote}, {"prompt_lookup_num_tokens": 4}):
        assert torch.equal(generate(both.remote, 24, **given, **assistant).sequences, alone)


def test_a_prompt_in_chunks(pair: Callable[[str], Pair]) -> None:
    both = pair("mistral")
    assert torch.equal(
        generate(both.remote, 8, prefill_chunk_size=7).sequences,
        generate(both.local, 8).sequences,
    )


def test_a_step_that_failed_halfway_can_be_taken_again(pair: Callable[[str], Pair]) -> None:
    class BreakError(Exception):
        pass

    def break_off(*_: Any) -> None:
        raise BreakError

    both = pair("llama")
    with torch.no_grad():
        caches = [model(**prompts(), use_cache=True).cache for model in (both.local, both.remote)]
        hook = both.remote.model.layers[1].register_forward_pre_hook(break_off)
        given = {"input_ids": torch.full((4, 1), 5)}
        given["attention_mask"] = torch.nn.functional.pad(
            prompts()["attention_mask"], (0, 1), value=1
        )
        with pytest.raises(BreakError):
            both.remote(**given, cache=caches[1])
        hook.remove()
        local = both.local(**given, cache=caches[0]).logits
        remote = both.remote(**given, cache=caches[1]).logits
    torch.testing.assert_close(remote, local, rtol=1e-4, atol=1e-4)


def test_threads_share_the_server(pair: Callable[[str], Pair]) -> None:
    families = ("llama", "mistral", "qwen3", "gpt2")
    models = [pair(family) for family in families]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda both: generate(both.remote, 10).sequences, models))
    for both, sequences in zip(models, together, strict=True):
        assert torch.equal(sequences, generate(both.local, 10).sequences)


@pytest.fixture
def named(server: AttentionServer) -> Iterator[Callable[..., None]]:
    """Names the server with options; afterwards it is as it was."""
    target = f"127.0.0.1:{server.port}"
    yield lambda **options: served.connect(target, **options)
    served.connect(target)


def test_a_model_that_is_not_served_is_asked_for(
    named: Callable[..., None], pair: Callable[[str], Pair]
) -> None:
    model = copy.deepcopy(pair("llama").remote)
    named(model="grouped", cache_dtype="fp32", reserved_tokens=1, lease=60.0)
    assert [session.lease for session in generate(model, 1).cache.sessions] == [60.0] * 4
    named(model="each")
    with pytest.raises(ValueError, match=r"num_kv_heads 2, .* FP32: the model 'each' at 127"):
        generate(model, 1)
    named(model="nothing")
    with pytest.raises(ValueError, match="model: 'nothing' is not served at 127"):
        generate(model, 1)
    named()
    with pytest.raises(ValueError, match=r"FP16: none at .* --mask causal --dtype fp16"):
        generate(model.to(torch.float16), 1)
    with pytest.raises(ValueError, match=r"query: torch.float64; allowed: torch.float32"):
        generate(model.to(torch.float64), 1)
    with pytest.raises(ValueError, match=r"reserved_tokens: 0; allowed: 1..16777216"):
        named(reserved_tokens=0)


@pytest.mark.slow
def test_the_command_that_an_error_gives_makes_the_model(
    server: AttentionServer, tmp_path: Path
) -> None:
    config = decoder(
        "Gemma2Config", num_attention_heads=6, hidden_size=48, query_pre_attn_scalar=20
    )()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="attnserve")
    with pytest.raises(ValueError, match="num_heads 6, num_kv_heads 2, head_dim 8") as raised:
        generate(model.eval(), 1)
    command = str(raised.value).partition("attnserve-export ")[2]
    command = command.replace("--out models", f"--out {tmp_path}")
    assert cli.main(command.split()) == 0
    with serving(tmp_path) as other:
        served.connect(f"127.0.0.1:{other.port}")
        try:
            generate(model, 1)
        finally:
            served.connect(f"127.0.0.1:{server.port}")


def test_the_environment_names_the_server(
    server: AttentionServer, pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pair("llama").remote
    monkeypatch.setattr(current, "_service", None)
    monkeypatch.delenv(TARGET_VARIABLE, raising=False)
    with pytest.raises(RuntimeError, match=r"no server was named; call .*connect.* or set ATTN"):
        generate(model, 1)
    monkeypatch.setenv(TARGET_VARIABLE, f"127.0.0.1:{server.port}")
    generate(model, 1)


def test_what_cannot_be_had_is_refused(pair: Callable[[str], Pair]) -> None:
    model, windowed = pair("llama").remote, pair("mistral").remote
    with pytest.raises(ValueError, match="a cache that holds tensors"):
        generate(model, 3, cache=transformers.DynamicCache())
    with pytest.raises(ValueError, match="a cache that holds tensors"):
        generate(model, 3, cache_implementation="static")
    with pytest.raises(ValueError, match="padding after a token, in a model with a window"):
        windowed(torch.ones(1, 4, dtype=torch.long), attention_mask=torch.tensor([[1, 0, 1, 1]]))
    with pytest.raises(ValueError, match="keys that are seen by a rule of its own"):
        model(
            torch.ones(1, 4, dtype=torch.long),
            position_ids=torch.tensor([[0, 1, 0, 1]]),
            use_cache=False,
        )
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(RuntimeError, match="no gradients"):
        model(ids).logits.sum().backward()
    cache = model(ids, use_cache=True).cache
    with pytest.raises(ValueError, match="attention_mask: not as before"):
        model(ids, attention_mask=torch.tensor([[0] + [1] * 7]), cache=cache)
    with pytest.raises(ValueError, match="a batch of 2; allowed: 1, as in the cache"):
        model(ids.repeat(2, 1), cache=cache)
    with pytest.raises(ValueError, match=r"attention_mask: \[1, 4\]; allowed: \[1, 8\]"):
        model(ids, attention_mask=ids, cache=cache)
    with pytest.raises(ValueError, match="tokens_to_remove: 3"):
        cache.crop(3)
    long = windowed(ids.repeat(1, 60), use_cache=True).cache
    with pytest.raises(FailedPreconditionError):
        long.crop(-200)


def test_other_models_are_refused(server: AttentionServer) -> None:
    ids = torch.ones(1, 4, dtype=torch.long)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    encoder = transformers.BertModel._from_config(
        transformers.BertConfig(vocab_size=20, intermediate_size=20, **sizes),
        attn_implementation="attnserve",
    )
    with pytest.raises(ValueError, match="attention that is not causal"):
        encoder.eval()(ids)
    both = transformers.BartForConditionalGeneration._from_config(
        transformers.BartConfig(vocab_size=20, d_model=32, encoder_layers=1, decoder_layers=1),
        attn_implementation="attnserve",
    )
    with pytest.raises(ValueError, match="cross-attention"):
        transformers.DynamicCache(config=both.config)
    training = transformers.AutoModelForCausalLM.from_config(
        decoder("LlamaConfig", attention_dropout=0.5)(), attn_implementation="attnserve"
    )
    with pytest.raises(ValueError, match=r"dropout 0.5; allowed: 0, as in model.eval\(\)"):
        training.train()(ids)
