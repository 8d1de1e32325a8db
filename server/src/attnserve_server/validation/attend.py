"""Checks of `AttendRequest`, in two steps.

`plan` checks everything that can be checked without the tensors' elements, so that a stream's
request is refused before its chunks arrive; `complete` checks the elements.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import wire

from attnserve_server import dtypes
from attnserve_server.dtypes import Array
from attnserve_server.engine import joining
from attnserve_server.engine.models import LoadedModel, ModelStore, Variant
from attnserve_server.engine.work import AttendWork, Dims, Wanted
from attnserve_server.errors import InvalidRequestError, PreconditionError
from attnserve_server.settings import Limits
from attnserve_server.validation import sizes
from attnserve_server.wire import tensors
from attnserve_server.wire.tensors import Region, TensorSpec

_CORE = ("query", "key", "value")

# The outputs of a variant that says what the weights say.
DIAGNOSTICS = frozenset(
    ("entropy", "mass_per_key", "mass_by_distance", "top_k_indices", "top_k_weights")
)


@dataclass(frozen=True, slots=True)
class AttendPlan:
    """A request that has been checked but for its elements.

    Attributes:
        specs: its tensors, by name.
        defaults: inputs of the graphs that do not come from the caller.
        kind: of the work, as the scheduler has it.
        query_factor: what query is multiplied by to give the scale asked for.
        softcap: a softcap other than the model's own, or None.
        results: the tensors of the answer, in the order of their field numbers.
        request_bytes, response_bytes: of all tensors.
        sent_bytes: of those that come with the request.
        working_bytes: estimated memory that it takes while it runs.
        priority: as the scheduler has it.
        output_region: where the answer's tensors go; None: into the answer.
    """

    model: LoadedModel
    variant: Variant
    diagnosis: Variant | None
    wanted: Wanted
    specs: Mapping[str, TensorSpec]
    dims: Dims
    defaults: Mapping[str, Array]
    kind: Hashable
    query_factor: float
    softcap: float | None
    results: Sequence[TensorSpec]
    request_bytes: int
    response_bytes: int
    sent_bytes: int
    working_bytes: int
    priority: int
    output_region: Region | None


def plan(
    message: pb.AttendRequest,
    data_bytes: Mapping[str, int],
    store: ModelStore,
    limits: Limits,
    *,
    chunks_allowed: bool,
    kept: Callable[[str, str], Array] | None = None,
) -> AttendPlan:
    """Check a request but for the elements of its tensors.

    Args:
        message: the request, its tensors' `data` left out.
        data_bytes: how long the `data` of each tensor was, by field name.
        store: the models.
        limits: what is accepted.
        chunks_allowed: whether tensors may follow in chunks.
        kept: finds a kept tensor by its handle, given the field for messages; None: none are kept.

    Raises:
        RequestError: with the field, what was given and what is allowed.
    """
    if not message.model:
        raise InvalidRequestError.of("model", "nothing", "a name that ListModels gives")
    model = store.get(message.model, message.version)
    specs = _specs(message, data_bytes, model, chunks_allowed, kept)
    dims = _dims(model, specs)
    _check_limits(dims, limits)
    request_bytes = sum(spec.byte_size for spec in specs.values())
    sizes.check("request", request_bytes, limits.max_request_bytes, "--max-request-mib")
    _check_against(model, specs, dims)
    query_factor, softcap = _options(message, model)
    wanted = _wanted(message.returns, dims)
    inputs = set(specs) | ({"softcap"} if softcap is not None else set())
    variant, diagnosis = _variants(model, message.variant, inputs, wanted, dims)
    results = sizes.results(model, specs, dims, wanted)
    response_bytes = sum(spec.byte_size for spec in results)
    sizes.check("response", response_bytes, limits.max_response_bytes, "--max-response-mib")
    working = max(
        sizes.working(model, runs, dims, request_bytes + response_bytes, limits)
        for runs in (variant, diagnosis)
        if runs is not None
    )
    return AttendPlan(
        model,
        variant,
        diagnosis,
        wanted,
        specs,
        dims,
        _defaults(model, variant, diagnosis, specs, dims, wanted, softcap),
        joining.kind(model, variant, diagnosis, wanted, dims, softcap, biased="bias" in specs),
        query_factor,
        softcap,
        results,
        request_bytes,
        response_bytes,
        sum(spec.byte_size for spec in specs.values() if spec.sent),
        working,
        sizes.priority(message.priority),
        sizes.output_region(message, results),
    )


def complete(
    ready: AttendPlan, arrays: Mapping[str, Array], into: Mapping[str, Array] | None = None
) -> AttendWork:
    """Check the elements, and add what the request left out.

    Args:
        ready: the request, checked but for its elements.
        arrays: its tensors.
        into: arrays to put results into, by name.

    Raises:
        InvalidRequestError: an element is out of range.
    """
    feeds = {**ready.defaults, **arrays}
    if "key_lengths" in arrays:
        _check_key_lengths(arrays["key_lengths"], ready.dims.key_len)
    if "bias" in arrays:
        _check_bias(arrays["bias"])
    if ready.query_factor != 1.0:
        query = feeds["query"]
        with np.errstate(over="ignore"):  # infinite scores: the caller's wish
            scaled = query * np.float32(ready.query_factor)
            feeds["query"] = scaled.astype(query.dtype, copy=False)
    return AttendWork(
        ready.model,
        ready.variant,
        ready.diagnosis,
        feeds,
        ready.wanted,
        ready.dims,
        ready.kind,
        joinable="bias" not in arrays,
        into=into or {},
        tensor_bytes=ready.request_bytes,
        working_bytes=ready.working_bytes,
        counted=ready.dims.batch,
    )


def _defaults(
    model: LoadedModel,
    variant: Variant,
    diagnosis: Variant | None,
    specs: Mapping[str, TensorSpec],
    dims: Dims,
    wanted: Wanted,
    softcap: float | None,
) -> dict[str, Array]:
    """What the graphs take besides the request's tensors."""
    takes = variant.session.inputs
    defaults: dict[str, Array] = {}
    if diagnosis is not None:
        takes |= diagnosis.session.inputs
        defaults["top_k"] = np.array([wanted.top_k], np.int64)
        defaults["distances"] = np.array([wanted.mass_by_distance], np.int64)
    if "key_lengths" in takes and "key_lengths" not in specs:
        defaults["key_lengths"] = np.full(dims.batch, dims.key_len, np.int64)
    if "bias" in takes and "bias" not in specs:
        dtype = dtypes.to_numpy(dtypes.number_of(model.manifest.dtype))
        defaults["bias"] = np.zeros((1, 1, 1, 1), dtype)
    if "softcap" in takes:
        defaults["softcap"] = np.array([_softcap(model, variant, softcap)], np.float32)
    return defaults


def _softcap(model: LoadedModel, variant: Variant, softcap: float | None) -> float:
    """What a graph with this input is fed."""
    if softcap is not None:
        return softcap
    if variant.entry.native or "softcap" not in variant.session.inputs:
        return -1.0  # the model's own
    # `softcap` asked for by name; it divides by what it is given.
    own = model.manifest.attention.softcap
    if not own:
        raise InvalidRequestError.of(
            "softcap", "none", f"a number above 0 with variant {variant.name!r}"
        )
    return own


def _variants(
    model: LoadedModel, forced: str, inputs: set[str], wanted: Wanted, dims: Dims
) -> tuple[Variant, Variant | None]:
    """The variant to run, and the one that says what the weights say, if they need not be held."""
    outputs = {"output"} if wanted.output else set()
    diagnosis = None
    if wanted.weights:
        outputs.add("weights")
    elif wanted.diagnosed:
        given = next((v for v in model.variants if v.name == forced), None)
        if given is None or "weights" not in given.session.outputs:
            # Weights do not depend on value.
            diagnosis = model.find(inputs - {"value"}, DIAGNOSTICS)
        if diagnosis is None:
            outputs.add("weights")
        elif not outputs:
            outputs.update(DIAGNOSTICS)
            inputs = inputs - {"value"}
    variant = model.choose(forced, inputs, outputs, max(dims.query_len, dims.key_len))
    return variant, diagnosis


def _specs(
    message: pb.AttendRequest,
    data_bytes: Mapping[str, int],
    model: LoadedModel,
    chunks_allowed: bool,
    kept: Callable[[str, str], Array] | None,
) -> dict[str, TensorSpec]:
    """Each tensor of the request, checked on its own."""
    manifest = model.manifest
    if manifest.kind == "transformer":
        raise PreconditionError(
            f"model: {manifest.name} is a transformer and takes tokens; use AttendTokens"
        )
    if manifest.layer is None:
        required: tuple[str, ...] = _CORE
    elif manifest.layer.context_dim is None:
        required = ("hidden_states",)
    else:
        required = ("hidden_states", "context")
    dims = {
        "query": ("B", "H", "Sq", "D"),
        "key": ("B", "Hkv", "Sk", "D"),
        "value": ("B", "Hkv", "Sk", "Dv"),
        "hidden_states": ("B", "Sq", "E"),
        "context": ("B", "Sk", "E"),
        "key_lengths": ("B",),
        "bias": ("1 or B", "1 or H", "1 or Sq", "1 or Sk"),
    }
    specs = {}
    for name in wire.REQUEST_TENSORS.values():
        if not message.HasField(name):  # type: ignore[arg-type]
            if name in required:
                raise InvalidRequestError.of(
                    name, "nothing", f"[{', '.join(dims[name])}] for {manifest.kind} models"
                )
            continue
        if name not in (*required, "key_lengths", "bias"):
            raise InvalidRequestError.of(
                name, "a tensor", f"{', '.join(required)} for model {manifest.name}"
            )
        specs[name] = tensors.check(
            name,
            getattr(message, name),
            data_bytes.get(name),
            dtype="INT64" if name == "key_lengths" else manifest.dtype,
            dims=dims[name],
            chunks_allowed=chunks_allowed,
            kept=kept,
        )
    return specs


def _dims(model: LoadedModel, specs: Mapping[str, TensorSpec]) -> Dims:
    num_heads = model.manifest.attention.num_heads
    if "query" in specs:
        batch, _, query_len, _ = specs["query"].shape
        return Dims(batch, num_heads, query_len, specs["key"].shape[2])
    batch, query_len, _ = specs["hidden_states"].shape
    other = specs.get("context", specs["hidden_states"])
    return Dims(batch, num_heads, query_len, other.shape[1])


def _check_limits(dims: Dims, limits: Limits) -> None:
    if dims.batch > limits.max_batch:
        raise InvalidRequestError.of("batch B", dims.batch, f"1..{limits.max_batch}")
    for name, length in (("Sq", dims.query_len), ("Sk", dims.key_len)):
        if length > limits.max_seq_len:
            raise InvalidRequestError.of(f"length {name}", length, f"1..{limits.max_seq_len}")


def _check_against(model: LoadedModel, specs: Mapping[str, TensorSpec], dims: Dims) -> None:
    """Compare the tensors' shapes with the model and with each other."""
    attention, layer = model.manifest.attention, model.manifest.layer
    batch = ("batch B, as the first tensor has", dims.batch)
    key_len = ("Sk, as key has", dims.key_len)
    kv_heads = ("num_kv_heads of the model", attention.num_kv_heads)
    head_dim = ("head_dim of the model", attention.head_dim)
    expected: dict[str, dict[int, tuple[str, int]]] = {
        "query": {1: ("num_heads of the model", attention.num_heads), 3: head_dim},
        "key": {0: batch, 1: kv_heads, 3: head_dim},
        "value": {
            0: batch,
            1: kv_heads,
            2: key_len,
            3: ("value_head_dim of the model", attention.value_head_dim),
        },
        "key_lengths": {0: batch},
    }
    if layer is not None:
        expected["hidden_states"] = {2: ("embed_dim of the model", layer.embed_dim)}
        expected["context"] = {0: batch, 2: ("context_dim of the model", layer.context_dim or 0)}
    for name, spec in specs.items():
        for axis, (what, size) in expected.get(name, {}).items():
            if spec.shape[axis] != size:
                raise InvalidRequestError.of(
                    f"{name}.shape", f"{list(spec.shape)}", f"{size} at axis {axis} ({what})"
                )
    if "bias" in specs:
        full = (dims.batch, dims.num_heads, dims.query_len, dims.key_len)
        shape = specs["bias"].shape
        if any(given not in (1, size) for given, size in zip(shape, full, strict=True)):
            raise InvalidRequestError.of(
                "bias.shape", list(shape), f"1 or the full size at each axis of {list(full)}"
            )


def _options(message: pb.AttendRequest, model: LoadedModel) -> tuple[float, float | None]:
    """The factor for query that gives the scale asked for, and a softcap unlike the model's."""
    attention = model.manifest.attention
    for name in ("scale", "softcap"):
        if message.HasField(name) and model.manifest.kind != "core":
            raise InvalidRequestError.of(
                name, getattr(message, name), f"nothing for {model.manifest.kind} models"
            )
    factor = 1.0
    if message.HasField("scale"):
        if not (math.isfinite(message.scale) and message.scale > 0):
            raise InvalidRequestError.of("scale", message.scale, "a finite number above 0")
        factor = message.scale / attention.scale
        if math.isclose(factor, 1.0, rel_tol=1e-7):
            factor = 1.0
    if not message.HasField("softcap"):
        return factor, None
    if not (math.isfinite(message.softcap) and message.softcap >= 0):
        raise InvalidRequestError.of("softcap", message.softcap, "a finite number, 0 (off) or more")
    if math.isclose(message.softcap, attention.softcap, rel_tol=1e-6):
        return factor, None
    if message.softcap == 0:
        raise PreconditionError(
            f"softcap: given 0; model {model.manifest.name} was exported with softcap "
            f"{attention.softcap}; allowed: a number above 0, or another model"
        )
    return factor, message.softcap


def _wanted(returns: pb.ReturnOptions, dims: Dims) -> Wanted:
    if returns.top_k > dims.key_len:
        raise InvalidRequestError.of(
            "returns.top_k", returns.top_k, f"0..{dims.key_len}, the number of keys"
        )
    wanted = Wanted(
        output=not returns.no_output,
        weights=returns.weights,
        entropy=returns.entropy,
        top_k=returns.top_k,
        mass_per_key=returns.mass_per_key,
        mass_by_distance=returns.mass_by_distance,
    )
    most = max(dims.query_len, dims.key_len)
    if wanted.mass_by_distance > most:
        raise InvalidRequestError.of(
            "returns.mass_by_distance", wanted.mass_by_distance, f"0..{most}, the longest length"
        )
    if not (wanted.output or wanted.weights or wanted.diagnosed):
        raise InvalidRequestError.of("returns", "nothing to return", "at least one thing")
    return wanted


def _check_key_lengths(lengths: Array, key_len: int) -> None:
    wrong = (lengths < 0) | (lengths > key_len)
    if wrong.any():
        row = int(wrong.argmax())
        raise InvalidRequestError.of(f"key_lengths[{row}]", int(lengths[row]), f"0..{key_len}")


def _check_bias(bias: Array) -> None:
    # max() is NaN if any element is.
    highest = float(bias.max())
    if math.isnan(highest) or highest == math.inf:
        at = np.unravel_index(int(bias.argmax()), bias.shape)
        raise InvalidRequestError.of(
            f"bias[{', '.join(str(int(i)) for i in at)}]", highest, "finite numbers and -infinity"
        )
