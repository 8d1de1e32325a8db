"""Sessions of layer models, over Decode's bare messages: hidden states in, projections inside.

Compared with Hugging Face's own Llama attention in float64 over each whole sequence, which has
neither cache nor pages.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attnserve_export.attention.layer import AttentionLayer, LayerConfig
from attnserve_export.attention.positions import Rotary
from attnserve_export.models import seeded
from attnserve_proto import attention_pb2 as pb
from attnserve_server.app import AttentionServer
from decode_streams import Array, Refused, Stream, generator, layer_of, result_of, step_of, tensor
from handmade import attention, write_core, write_layer
from serving import serving
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

pytestmark = pytest.mark.needs_library

HEADS, KV_HEADS, DIM, EMBED, PAGE = 4, 2, 8, 24, 16
SEEDS = {"first": 1, "second": 2, "third": 3}
ATTENTION = {"num_kv_heads": KV_HEADS, "mask": "causal", "rotary": Rotary("half", DIM)}


def made(seed: int, **others: Any) -> AttentionLayer:
    """A layer of random parameters."""
    config = LayerConfig(attention(HEADS, DIM, **ATTENTION | others), EMBED, context_dim=None)
    return seeded(AttentionLayer, config, seed)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    layers = {name: made(seed) for name, seed in SEEDS.items()}
    layers |= {"windowed": made(4, window=20), "narrow": made(5, num_kv_heads=1)}
    for name, layer in layers.items():
        write_layer(folder, name, layer, variants=("paged",))
    write_core(folder, "core", attention(HEADS, DIM, **ATTENTION))
    return folder


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[AttentionServer]:
    with serving(models) as running:
        yield running


@pytest.fixture
def stream(server: AttentionServer) -> Iterator[Stream]:
    with Stream(server.address) as opened:
        yield opened


class Llama:
    """Llama's attention, whole sequences at a time."""

    def __init__(self, layer: AttentionLayer) -> None:
        config = LlamaConfig(
            hidden_size=EMBED,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=DIM,
            attention_bias=True,
            attn_implementation="eager",
        )
        self._module = LlamaAttention(config, layer_idx=0).double().eval()
        self._module.load_state_dict(layer.state_dict())
        self._rotary = LlamaRotaryEmbedding(config)
        self._window = layer.config.attention.window

    def __call__(self, hidden: Array) -> Array:
        """[n, E] to [n, E]."""
        return self.with_weights(hidden)[0]

    def with_weights(self, hidden: Array) -> tuple[Array, Array]:
        """[n, E] to [n, E] and weights [n, H, n]."""
        states = torch.from_numpy(hidden.astype(np.float64))[None]
        at = torch.arange(len(hidden))
        later = at[None, :] > at[:, None]
        if self._window is not None:
            later |= at[None, :] <= at[:, None] - self._window
        mask = torch.zeros(later.shape, dtype=torch.float64).masked_fill(later, -torch.inf)
        with torch.no_grad():
            angles = self._rotary(states, at[None])
            output, weights = self._module(states, angles, mask[None, None])
        return output[0].numpy(), weights[0].transpose(0, 1).numpy()


LAYERS = {name: Llama(made(seed)) for name, seed in SEEDS.items()}


def opening(count: int = 1, **fields: Any) -> pb.OpenSessions:
    """Sessions of the model "first" and two layers, unless fields say otherwise."""
    room = {"max_tokens": 256, "prefix_hashes": fields.pop("prefix_hashes", b"")}
    given: dict[str, Any] = {"num_layers": 2}
    if "layer_models" not in fields:
        given["model"] = "first"
    return pb.OpenSessions(sessions=[pb.NewSession(**room)] * count, **given | fields)


def each(*names: str) -> list[pb.ModelOfLayer]:
    """Models of layers."""
    return [pb.ModelOfLayer(model=name) for name in names]


def opened(stream: Stream, **fields: Any) -> list[str]:
    """Open sessions; answers their ids."""
    return [s.session_id for s in stream.ask(open=opening(**fields)).sessions]


def hidden_of(tokens: int) -> Array:
    """Random hidden states [tokens, E]."""
    return generator.standard_normal((tokens, EMBED)).astype(np.float32)


def asking(step_id: int, layer: int, hidden: Array, **fields: Any) -> pb.AttendLayer:
    """A layer with hidden states."""
    return pb.AttendLayer(step_id=step_id, layer=layer, hidden_states=tensor(hidden), **fields)


def output_of(attended: pb.AttendedLayer) -> Array:
    """Its output."""
    return np.frombuffer(attended.output.data, np.float32).reshape(attended.output.shape)


def step(
    stream: Stream,
    step_id: int,
    ids: Sequence[str],
    pasts: list[list[Array]],
    counts: Sequence[int],
    layers: Sequence[Callable[[Array], Array]],
) -> None:
    """A step of random hidden states, compared; `pasts`: of each session and layer, all so far."""
    stream.begin(step_id, ids, counts)
    for number, layer in enumerate(layers):
        hidden = hidden_of(sum(counts))
        attended = stream.ask(attend_layer=asking(step_id, number, hidden))
        output, at = output_of(attended), 0
        assert output.shape == hidden.shape
        for past, count in zip(pasts, counts, strict=True):
            past[number] = np.concatenate([past[number], hidden[at : at + count]])
            expected = layer(past[number])[-count:]
            np.testing.assert_allclose(output[at : at + count], expected, atol=1e-5)
            at += count
        assert attended.step_ended == (number == len(layers) - 1)


def nothing(layers: int = 2) -> list[Array]:
    """What a new session has of each layer."""
    return [hidden_of(0) for _ in range(layers)]


def test_prompts_and_single_tokens_of_one_model_for_all_layers(stream: Stream) -> None:
    ids, pasts = opened(stream, count=4), [nothing() for _ in range(4)]
    for step_id, counts in enumerate(([5, 40, 1, 17], [1, 1, 1, 1], [1, 30, 16, 1]), start=1):
        step(stream, step_id, ids, pasts, counts, [LAYERS["first"]] * 2)
    step(stream, 9, ids[1:3], pasts[1:3], [1, 2], [LAYERS["first"]] * 2)


def test_each_layer_has_its_own_model(stream: Stream) -> None:
    names = ("second", "first", "third")
    ids = opened(stream, count=2, num_layers=3, layer_models=each(*names))
    pasts, layers = [nothing(3) for _ in ids], [LAYERS[name] for name in names]
    for step_id, counts in enumerate(([20, 3], [1, 1], [1, 33], [2, 1]), start=1):
        step(stream, step_id, ids, pasts, counts, layers)
    fork = stream.ask(fork=pb.ForkSession(session_id=ids[0], length=19))
    branch = [past[:19] for past in pasts[0]]
    step(stream, 10, [fork.session_id, ids[0]], [branch, pasts[0]], [3, 2], layers)
    stream.ask(truncate=pb.TruncateSession(session_id=ids[1], length=4))
    pasts[1] = [past[:4] for past in pasts[1]]
    step(stream, 11, [ids[1]], [pasts[1]], [1], layers)


def test_a_model_of_its_own_window_among_others(stream: Stream) -> None:
    layers = [LAYERS["first"], Llama(made(4, window=20))]
    ids = opened(stream, layer_models=each("first", "windowed"))
    pasts = [nothing()]
    for step_id, count in enumerate((50, 1, 30, 1), start=1):
        step(stream, step_id, ids, pasts, [count], layers)


def test_tokens_of_a_tree_are_at_the_positions_of_their_paths(stream: Stream) -> None:
    ids, past = opened(stream), nothing()
    step(stream, 1, ids, [past], [21], [LAYERS["first"]] * 2)
    parents = [-1, 0, 0, 2, -1, 3]
    begun = pb.SessionStep(session_id=ids[0], new_tokens=len(parents), parents=parents)
    stream.ask(begin_step=pb.BeginStep(step_id=2, sessions=[begun]))
    given = []
    for number in range(2):
        hidden = hidden_of(len(parents))
        given.append(hidden)
        output = output_of(stream.ask(attend_layer=asking(2, number, hidden)))
        for token in range(len(parents)):
            path = [token]
            while parents[path[0]] >= 0:
                path.insert(0, parents[path[0]])
            whole = np.concatenate([past[number], hidden[path]])
            np.testing.assert_allclose(output[token], LAYERS["first"](whole)[-1], atol=1e-5)
    accepted = [0, 2, 3, 5]
    state = stream.ask(commit=pb.CommitTree(session_id=ids[0], accepted=accepted))
    assert state.length == 25
    past = [np.concatenate([p, g[accepted]]) for p, g in zip(past, given, strict=True)]
    step(stream, 3, ids, [past], [2], [LAYERS["first"]] * 2)


def test_a_layer_may_begin_its_step_and_say_what_its_heads_say(stream: Stream) -> None:
    ids, hidden = opened(stream), hidden_of(6)
    returns = pb.LayerReturns(log_sum_exp=True, entropy=True)
    begin = step_of(0, ids, [6])
    attended = stream.ask(attend_layer=asking(7, 0, hidden, begin=begin, returns=returns))
    assert list(attended.lengths) == [0]
    np.testing.assert_allclose(output_of(attended), LAYERS["first"](hidden), atol=1e-5)
    entropy = np.frombuffer(attended.entropy.data, np.float32).reshape(6, HEADS)
    assert np.abs(entropy[0]).max() < 1e-6  # the first token sees itself alone
    assert (entropy[1:] <= np.log(np.arange(2, 7))[:, None] + 1e-6).all()
    assert list(attended.log_sum_exp.shape) == [6, HEADS]


def test_weights_of_named_sessions(stream: Stream) -> None:
    ids, pasts = opened(stream, count=3), [nothing() for _ in range(3)]
    step(stream, 1, ids, pasts, [4, 20, 7], [LAYERS["first"]] * 2)
    counts, hidden = [2, 1, 3], hidden_of(6)
    stream.begin(2, ids, counts)
    returns = pb.LayerReturns(weights_of=[0, 2])
    attended = stream.ask(attend_layer=asking(2, 1, hidden, returns=returns))
    for weights, index, rows in zip(
        attended.weights, (0, 2), (slice(0, 2), slice(3, 6)), strict=True
    ):
        whole = np.concatenate([pasts[index][1], hidden[rows]])
        expected = LAYERS["first"].with_weights(whole)[1][-counts[index] :]
        got = np.frombuffer(weights.data, np.float32).reshape(weights.shape)
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_callers_of_one_model_are_computed_together_and_others_apart(models: Path) -> None:
    names, parents = ("first", "first", "second"), [-1, 0, 0]
    with (
        serving(models, batch_delay=0.5) as server,
        Stream(server.address) as one,
        Stream(server.address) as two,
        Stream(server.address) as three,
    ):
        streams, given = (one, two, three), [hidden_of(3) for _ in names]
        for stream, name in zip(streams, names, strict=True):
            (session,) = opened(stream, num_layers=1, model=name)
            tree = parents if stream is one else []
            begun = pb.SessionStep(session_id=session, new_tokens=3, parents=tree)
            stream.ask(begin_step=pb.BeginStep(step_id=1, sessions=[begun]))
        for stream, hidden in zip(streams, given, strict=True):
            stream.send(attend_layer=asking(1, 0, hidden))
        answers = [result_of(stream.receive()) for stream in streams]
        assert [answer.timings.batch_size for answer in answers] == [2, 2, 1]
        outputs = [output_of(answer) for answer in answers]
        for output, hidden, name in zip(outputs[1:], given[1:], names[1:], strict=True):
            np.testing.assert_allclose(output, LAYERS[name](hidden), atol=1e-5)
        for token, path in enumerate(([0], [0, 1], [0, 2])):
            expected = LAYERS["first"](given[0][path])[-1]
            np.testing.assert_allclose(outputs[0][token], expected, atol=1e-5)


def test_a_session_of_several_models_is_exported_and_imported(stream: Stream) -> None:
    names = ("third", "second")
    layers = [LAYERS[name] for name in names]
    ids, past = opened(stream, layer_models=each(*names)), nothing()
    step(stream, 1, ids, [past], [40], layers)
    stream.send(export_session=pb.ExportSession(session_id=ids[0]))
    chunks = [result_of(stream.receive())]
    while not chunks[-1].last:
        chunks.append(result_of(stream.receive()))
    request_id = stream.send(import_session=pb.ImportSession(chunk=chunks[0]))
    for chunk in chunks[1:]:
        stream.send(request_id, import_session=pb.ImportSession(chunk=chunk))
    imported = result_of(stream.receive())
    assert imported.length == 40
    step(stream, 2, [imported.session_id, *ids], [list(past), past], [1, 3], layers)


def test_prefixes_are_those_of_the_same_models_alone(stream: Stream) -> None:
    hashes = generator.bytes(32 * 2)
    kinds: list[dict[str, Any]] = [
        {"layer_models": each("first", "second")},
        {"layer_models": each("second", "first")},
        {"model": "first"},
    ]
    (first,) = opened(stream, **kinds[0])
    published = pb.SessionStep(session_id=first, new_tokens=2 * PAGE, prefix_hashes=hashes)
    stream.ask(begin_step=pb.BeginStep(step_id=1, sessions=[published]))
    hidden = [hidden_of(2 * PAGE) for _ in range(2)]
    for number in range(2):
        stream.ask(attend_layer=asking(1, number, hidden[number]))
    lengths = [
        stream.ask(open=opening(prefix_hashes=hashes, **kind)).sessions[0].length for kind in kinds
    ]
    assert lengths == [2 * PAGE, 0, 0]
    found = stream.ask(open=opening(prefix_hashes=hashes, **kinds[0])).sessions[0].session_id
    step(stream, 2, [found], [hidden], [3], [LAYERS["first"], LAYERS["second"]])


def test_equal_models_of_layers_are_one_for_all(stream: Stream) -> None:
    ids = opened(stream, layer_models=each("first", "first")) + opened(stream)
    step(stream, 1, ids, [nothing(), nothing()], [2, 3], [LAYERS["first"]] * 2)


def test_a_core_with_rotary_embedding_is_told_positions(stream: Stream) -> None:
    """Query and key of a projection outside: the same output before its last projection."""
    layer = made(1).double()
    ids = opened(stream, model="core", num_layers=1)
    past = hidden_of(0)
    for step_id, count in enumerate((20, 1, 7), start=1):
        past = np.concatenate([past, hidden_of(count)])
        states = torch.from_numpy(past[-count:].astype(np.float64))[None]
        with torch.no_grad():
            heads = [
                heads[0].transpose(0, 1).float().numpy() for heads in layer.heads(states, states)
            ]
            stream.begin(step_id, ids, [count])
            attended = stream.ask(attend_layer=layer_of(step_id, 0, heads))
            output = torch.from_numpy(output_of(attended).astype(np.float64))
            merged = layer.merge(output[None].transpose(1, 2))[0].numpy()
        np.testing.assert_allclose(merged, LAYERS["first"](past)[-count:], atol=1e-5)


BAD_OPENINGS: list[tuple[dict[str, Any], str]] = [
    (
        {"layer_models": each("first", "narrow")},
        r"INVALID_ARGUMENT: layer_models\[1\]\.model: given narrow of num_kv_heads 1; "
        "allowed: num_kv_heads 2, as the first layer's, first, has",
    ),
    (
        {"layer_models": each("first")},
        r"INVALID_ARGUMENT: layer_models: given 1 of them; allowed: none, or num_layers, 2",
    ),
    (
        {"layer_models": each("first", "first"), "model": "first"},
        "INVALID_ARGUMENT: model: given 'first'; allowed: nothing with layer_models",
    ),
    (
        {"layer_models": each("first", "core")},
        r"FAILED_PRECONDITION: layer_models\[1\]\.model: core is a core; allowed: a layer model",
    ),
    (
        {"layer_models": each("first", "nope")},
        r"NOT_FOUND: layer_models\[1\]\.model: given 'nope'",
    ),
    ({"layer_models": each("", "first")}, r"layer_models\[0\]\.model: given nothing"),
    (
        {"layers": [pb.LayerSpec(cross=True)]},
        r"INVALID_ARGUMENT: layers\[0\]\.cross: given true; allowed: false, as first is a layer",
    ),
    (
        {"layers": [pb.LayerSpec(), pb.LayerSpec(latent=True)]},
        r"INVALID_ARGUMENT: layers\[1\]\.latent: given true; allowed: false, as first is a layer",
    ),
    (
        {"model": "core", "layers": [pb.LayerSpec(cross=True)]},
        r"INVALID_ARGUMENT: layers\[0\]\.cross: given true; allowed: false, as core has rotary",
    ),
]


@pytest.mark.parametrize(("fields", "message"), BAD_OPENINGS)
def test_bad_openings_say_what_is_allowed(
    stream: Stream, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refused, match=message):
        stream.ask(open=opening(**fields))


def test_a_layer_that_is_given_the_wrong_tensors_is_refused(stream: Stream) -> None:
    ids, past, hidden = opened(stream), nothing(), hidden_of(3)
    heads = generator.standard_normal((3, HEADS, DIM)).astype(np.float32)
    stream.begin(1, ids, [3])
    wrong = [
        (pb.AttendLayer(step_id=1), r"hidden_states: given nothing; allowed: \[T, E\]"),
        (asking(1, 0, hidden[:2]), r"hidden_states\.shape: given \[2, 24\]; allowed: 3 at axis 0"),
        (asking(1, 0, hidden[:, :8]), r"hidden_states\.shape: given \[3, 8\]; allowed: 24 at axis"),
        (asking(1, 0, hidden, query=tensor(heads)), "query: given a tensor; allowed: nothing for"),
        (asking(1, 0, hidden, value=tensor(heads)), "value: given a tensor; allowed: nothing for"),
    ]
    for message, refusal in wrong:
        with pytest.raises(Refused, match=f"INVALID_ARGUMENT: {refusal}"):
            stream.ask(attend_layer=message)
    with pytest.raises(Refused, match="key: given a tensor; allowed: nothing for a layer model"):
        stream.ask(attend_layer=pb.AttendLayer(step_id=1, key=tensor(heads)))
    stream.ask(abandon_step=pb.AbandonStep(step_id=1))
    step(stream, 2, ids, [past], [3], [LAYERS["first"]] * 2)

    (core,) = opened(stream, model="core")
    stream.begin(3, [core], [3])
    with pytest.raises(Refused, match="hidden_states: given a tensor; allowed: nothing for a core"):
        stream.ask(attend_layer=asking(3, 0, hidden))
