"""What the SDK's calls return: frozen dataclasses that hold NumPy arrays."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from attnserve_proto.commands import extension
from numpy.typing import NDArray

Array = NDArray[Any]


def _lens(name: str) -> Any:
    found = extension("attnserve.results", name)
    if found is None:
        raise ImportError(f"{name} is not installed; `pip install 'attnserve-client[lens]'`")
    return found


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the server spent its time, in microseconds: spans of wall time, one after another.

    What overlaps, one part of a request computed while another arrives, counts once. So their sum
    is at most what the caller waited.

    Attributes:
        deserialize: wire to arrays and validation; over a stream, the wait for chunks included.
        queue: waiting for a place to run.
        compute: running the model.
        serialize: from then until the answer was begun.
        batch_size: sequences that ran together.
    """

    deserialize: int
    queue: int
    compute: int
    serialize: int
    batch_size: int

    @property
    def total(self) -> int:
        """Of the request's time, what passed in the server; the rest is the wire and the client."""
        return self.deserialize + self.queue + self.compute + self.serialize


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that the server keeps; `attend` takes it wherever it takes an array.

    Attributes:
        handle: the server's name for it. It cannot be guessed: whoever knows it
            (and is the same caller, where callers are identified) may use it.
        lease: seconds that the server keeps it after its last use.
        shape, dtype: of the array that was put.
        server: which of a client's several servers keeps it; empty: the client has one.
        integers: the elements, if they are integers and this client put them: results say by them
            how sequences were packed.
    """

    handle: str
    lease: float
    shape: tuple[int, ...]
    dtype: "np.dtype[Any]"
    server: str = ""
    integers: Array | None = field(default=None, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class SessionLayer:
    """Which keys a query of one layer of a session sees.

    Attributes:
        window: keys up to its own that a query sees, itself included; None: as the model, 0: all.
        kept_first: with a window: the session's first keys that it sees besides.
        cross: keys are written once, by a step with `cross_tokens`, and every query sees all.
        latent: one row is kept of each token, the key, whose first Dv numbers are the value (MLA);
            no value is sent.
        sinks: of each head, a logit that takes part in the softmax and has no value; None: as the
            model. Not of layer models.
    """

    window: int | None = None
    kept_first: int = 0
    cross: bool = False
    latent: bool = False
    sinks: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class LayerResult:
    """One layer of a step; what was not asked for is None.

    Attributes:
        output: [T, H, Dv], T the new tokens of all sessions of the step, one after another; of a
            layer model [T, E].
        log_sum_exp: [T, H] float32, of each query's scores and its head's sink, if there is one;
            -inf where it saw nothing.
        entropy: [T, H] float32, nats.
        weights: of each session that was asked for, [t, H, K] float32: of its t new tokens and the
            K keys that it has with them; 0 where a key is not seen.
        starts: where each session's tokens begin in T, and where the last one's end.
        step_ended: whether this was the step's last layer.
        timings: where the server spent its time.
    """

    output: Array | None
    log_sum_exp: Array | None
    entropy: Array | None
    weights: list[Array]
    starts: tuple[int, ...]
    step_ended: bool
    timings: Timings

    @property
    def outputs(self) -> list[Array]:
        """The output of each session, [its new tokens, ...]: views of `output`."""
        if self.output is None:
            return []
        return [self.output[first:last] for first, last in pairwise(self.starts)]


@dataclass(frozen=True, slots=True)
class AttendResult:
    """The answer of `attend`; what was not asked for is None.

    Attributes:
        model, version, variant: what ran.
        output: [B, H, Sq, Dv] of a core model, [B, Sq, E] of a layer.
        weights: [B, H, Sq, Sk].
        entropy: [B, H, Sq] FP32, nats.
        top_k_indices: [B, H, Sq, k] INT64, heaviest first.
        top_k_weights: [B, H, Sq, k] FP32.
        mass_per_key: [B, H, Sk] FP32. Of self-attention layers, tokens from key_lengths on are no
            queries here and in the next; their entropy is 0.
        mass_by_distance: [B, H, N] FP32.
        log_sum_exp: [B, H, Sq] FP32, natural logarithm, of each query's scores and its head's sink,
            if there is one; -inf where it saw nothing.
        cu_seqlens_q, cu_seqlens_k: [N + 1] INT64: of packed sequences, where each begins, as the
            request gave it; None where it named stored tensors that another client had put.
        timings: the server's own.
    """

    model: str
    version: str
    variant: str
    timings: Timings
    output: Array | None = None
    weights: Array | None = None
    entropy: Array | None = None
    top_k_indices: Array | None = None
    top_k_weights: Array | None = None
    mass_per_key: Array | None = None
    mass_by_distance: Array | None = None
    log_sum_exp: Array | None = None
    cu_seqlens_q: Array | None = None
    cu_seqlens_k: Array | None = None

    def sink_mass(self, sinks: Sequence[float] | Array) -> Array:
        """What sinks take of the weight of each query: the rows of the weights sum to the rest.

        Args:
            sinks: [H], as the request gave them, or else the model's: `get_model(name).sinks`.

        Returns:
            [B, H, Sq] FP32, each 0..1; 0 for heads whose sink is -inf.

        Raises:
            ValueError: the log-sum-exp was not asked for, or there are other heads than sinks.
        """
        if self.log_sum_exp is None:
            raise ValueError("sink_mass: given no log_sum_exp; allowed: return_log_sum_exp=True")
        logits: Array = np.asarray(sinks, np.float32)
        heads = self.log_sum_exp.shape[1]
        if logits.shape != (heads,):
            raise ValueError(f"sinks: given shape {list(logits.shape)}; allowed: [{heads}]")
        # -inf less -inf, where nothing is seen and there is no sink, is no number.
        seen = np.where(np.isneginf(self.log_sum_exp), np.float32(0), self.log_sum_exp)
        taken: Array = np.exp(logits[:, None] - seen)
        return taken

    def plot(self, kind: str = "", **options: Any) -> Any:
        """Draw the weights with matplotlib; see `attnserve_lens.plot.plot`.

        Raises:
            ImportError: attnserve-lens is not installed.
        """
        return _lens("plot")(self, kind, **options)

    def save_html(self, path: Any, *, title: str = "") -> Any:
        """Write a page to explore the weights; see `attnserve_lens.write_page`.

        Raises:
            ImportError: attnserve-lens is not installed.
        """
        return _lens("save_html")(self, path, title=title)

    def _repr_html_(self) -> str | None:
        # Without it a notebook shows the `repr`.
        shown = extension("attnserve.results", "summary_html")
        return None if shown is None else str(shown(self))


@dataclass(frozen=True, slots=True)
class Patches:
    """How a picture is read: `first` tokens that stand for no place in it, then one for each patch,
    row by row.
    """

    first: int
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class ModelInput:
    """A tensor that a transformer takes in the place of token ids.

    Attributes:
        name: "inputs_embeds", "pixel_values", "input_features" or "encoder_hidden_states".
        dtype: "FP32", "FP16" or "BF16".
        shape: of one sequence, without the batch; None is its length, of any size.
        tokens: what one sequence is read as; None: as many as its length.
        patches: of pictures whose patches are tokens.
        frames_per_token: of sounds whose frames, the last dimension, become fewer tokens.
        preprocessor: what the checkpoint says of how it is made, as transformers writes it.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    tokens: int | None = None
    patches: Patches | None = None
    frames_per_token: int | None = None
    preprocessor: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class TokensResult:
    """The answer of `attend_tokens`: lists with one entry per sequence, without padding.

    Attributes:
        model, version, variant: what ran.
        ids: token ids of each sequence.
        token_type_ids: of each id what kind of token it is: 1 in the second text of a pair, for
            models that tell them apart, else 0.
        tokens: their texts; empty lists without a tokenizer.
        truncated: whether a text was cut.
        hidden: [S, E] each; of an encoder-decoder, its decoder's: [T, E].
        pooled: [E] FP32 each.
        weights: [L, H, Sq, Sk] each: the layers and heads named below. Queries and keys are the S
            tokens of the input, but queries of `decoder` and `cross` attention in an
            encoder-decoder, and keys of `decoder`, the T tokens of the target.
        entropy: [L, H, Sq] FP32 each, nats.
        layers, heads: what the L and H axes hold, 0-based.
        attention: which one that is; empty if nothing was asked of it.
        effective_context: [L, H, Sq] FP32 each: exp(entropy), 1..Sk.
        mass_by_distance: [L, H, N] FP32 each; sums to Sq.
        mass_on_first: [L, H, Sq] FP32 each, 0..1.
        encoder_hidden: [S, E] each, of an encoder-decoder.
        target_ids, target_tokens, target_truncated: of the targets, as above of the inputs;
            empty lists where the model has none.
        lengths: S of each sequence.
        source: which tensor was read in the place of ids; None: ids were. Then `ids` are empty, and
            `tokens` say which patch of a picture each one is: "row,column".
        given: that tensor, as it was sent: [B, ...].
        timings: the server's own.
    """

    model: str
    version: str
    variant: str
    timings: Timings
    ids: list[list[int]]
    tokens: list[list[str]]
    truncated: list[bool]
    hidden: list[Array] | None = None
    pooled: list[Array] | None = None
    weights: list[Array] | None = None
    entropy: list[Array] | None = None
    layers: list[int] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)
    attention: str = ""
    effective_context: list[Array] | None = None
    mass_by_distance: list[Array] | None = None
    mass_on_first: list[Array] | None = None
    encoder_hidden: list[Array] | None = None
    target_ids: list[list[int]] = field(default_factory=list)
    target_tokens: list[list[str]] = field(default_factory=list)
    target_truncated: list[bool] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    source: ModelInput | None = None
    given: Array | None = None
    token_type_ids: list[list[int]] = field(default_factory=list)

    def plot(self, kind: str = "", **options: Any) -> Any:
        """Draw the weights with matplotlib; see `attnserve_lens.plot.plot`.

        Raises:
            ImportError: attnserve-lens is not installed.
        """
        return _lens("plot")(self, kind, **options)

    def save_html(self, path: Any, *, title: str = "") -> Any:
        """Write a page to explore the weights; see `attnserve_lens.write_page`.

        Raises:
            ImportError: attnserve-lens is not installed.
        """
        return _lens("save_html")(self, path, title=title)

    def _repr_html_(self) -> str | None:
        # Without it a notebook shows the `repr`.
        shown = extension("attnserve.results", "summary_html")
        return None if shown is None else str(shown(self))


@dataclass(frozen=True, slots=True)
class Variant:
    """One ONNX graph of a model, and how far it is from its reference.

    Attributes:
        quadratic_memory: it holds scores of all queries and keys while it runs.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    providers: tuple[str, ...]
    max_abs_error: float
    tolerance: float
    quadratic_memory: bool = False


@dataclass(frozen=True, slots=True)
class TransformerAttention:
    """One of a transformer's attentions.

    Attributes:
        name: "encoder", "decoder" or, from the decoder to the encoder, "cross".
        mask: "bidirectional", "causal" or "cross".
        windows: of each layer: keys up to its own that a query sees; 0 is all.
    """

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mask: str
    windows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """One version of a model.

    Attributes:
        kind: "core", "layer" or "transformer".
        dtype: "FP32", "FP16" or "BF16".
        mask: "bidirectional", "causal" or "cross".
        window: keys to the left that a query sees, itself included; 0 is all.
        max_seq_len: 0 where only the server's limits apply.
        window_right: keys to the right that a query sees; None is all, unless causal.
        bottom_right: query i is at position key_length - Sq + i among the keys, instead of i.
        alibi: scores fall with distance.
        rotary: how query and key are turned by their positions: "half", "interleaved" or "".
        attentions: of a transformer.
        chunk: positions of a chunk, of which a query sees its own alone; 0 is all.
        vocab_size: 0 of a transformer that takes no token ids.
        takes_ids: whether the source of a transformer may be token ids.
        inputs: tensors that may be its source instead.
        token_types: kinds of token that token_type_ids tell apart; 0: it takes none.
        max_text_len: tokens that texts are cut to, where they are; 0 as in max_seq_len.
        sinks: of each head, a logit that takes part in the softmax and has no value; (): none.
        manifest: model.json as text; only from `get_model`.
    """

    name: str
    version: str
    kind: str
    dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    mask: str
    window: int
    scale: float
    softcap: float
    embed_dim: int
    num_layers: int
    vocab_size: int
    max_seq_len: int
    takes_text: bool
    variants: tuple[Variant, ...]
    source: str
    window_right: int | None = None
    bottom_right: bool = False
    alibi: bool = False
    chunk: int = 0
    rotary: str = ""
    attentions: tuple[TransformerAttention, ...] = ()
    takes_ids: bool = False
    inputs: tuple[ModelInput, ...] = ()
    token_types: int = 0
    max_text_len: int = 0
    sinks: tuple[float, ...] = ()
    manifest: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server accepts; sizes in bytes."""

    max_message_bytes: int
    max_request_bytes: int
    max_response_bytes: int
    max_seq_len: int
    max_batch: int
    chunk_bytes: int
    max_queue: int
    max_stored_bytes: int = 0
    max_session_bytes: int = 0
    session_page_tokens: int = 0


@dataclass(frozen=True, slots=True)
class UnavailableModel:
    """A version in the server's repository that did not load, and why."""

    name: str
    version: str
    reason: str


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What the server is and runs on.

    Attributes:
        state: "serving" or "draining".
        unavailable: what of its repository it does not serve.
    """

    name: str
    version: str
    onnxruntime_version: str
    providers: tuple[str, ...]
    limits: Limits
    state: str
    unavailable: tuple[UnavailableModel, ...] = ()
