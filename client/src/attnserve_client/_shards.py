"""How one session is laid over several servers, and what can be laid so."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from attnserve_client import _arguments as arguments
from attnserve_client._results import Model, SessionLayer
from attnserve_client._session_messages import MOST_TOKENS, SessionOptions

_MOST_SHARDS = 256


@dataclass(frozen=True, slots=True)
class Shards:
    """One session over several servers.

    Attributes:
        count: servers, each with a part of it.
        by: "heads": each server has the keys and values of some heads, and the query's heads that
            belong to them; the model named is of one server's heads. "context": each server has
            those of some tokens, of all heads; a step's tokens go to the server with the fewest.
    """

    count: int
    by: str = "heads"


def checked(shards: Any, servers: int, options: SessionOptions) -> Shards:
    """What a session is opened with.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    arguments.kind("shards", shards, Shards, "Shards, or None: a session at one server")
    arguments.integer("shards.count", shards.count, 2, _MOST_SHARDS)
    arguments.one_of("shards.by", shards.by, ("heads", "context"))
    if shards.count > servers:
        raise arguments.refused(
            "shards.count", shards.count, f"2 to {servers}, the servers of this client"
        )
    if options.get("layer_models"):
        raise ValueError("layer_models: given with shards; allowed: a core model")
    if shards.by == "context":
        for name in ("prefix_hashes", "cross_tokens"):
            if options.get(name):
                raise ValueError(f"{name}: given with shards by context; allowed: none")
    return Shards(shards.count, shards.by)


def options_of_parts(shards: Shards, model: Model, options: SessionOptions) -> list[SessionOptions]:
    """What each server's part is opened with.

    Raises:
        ValueError: the model, or a layer, cannot be laid so; says why.
    """
    allowed = "a core model without ALiBi"
    why = ""
    if model.kind != "core":
        why = f"is of kind {model.kind}, whose projections need all heads"
    elif model.alibi:
        why = "has ALiBi, whose slopes and distances are of all heads and tokens"
    elif shards.by == "context":
        allowed += ", rotary embedding and window"
        if model.rotary:
            why = "has rotary embedding, by positions that a server with some tokens does not know"
        elif _windowed(model, options):
            why = "has a window, of tokens that may be at other servers"
    if why:
        raise ValueError(
            f"shards: by {shards.by} of model {model.name!r}, which {why}; allowed: {allowed}"
        )
    layers = _layers(options)
    if shards.by == "heads":
        return [
            _with_layers(options, [_heads_of(each, shards.count, part) for each in layers])
            for part in range(shards.count)
        ]
    return [
        _with_room(_with_layers(options, _sinks_once(layers, model, part)), shards.count)
        for part in range(shards.count)
    ]


def heads_of(array: Any, name: str, count: int, part: int) -> Any:
    """The heads of one part, of [T, heads, dim].

    Raises:
        ValueError: it has another rank, or its heads cannot be parted.
    """
    given = np.asarray(array) if not hasattr(array, "shape") else array
    shape = tuple(given.shape)
    if len(shape) != 3 or shape[1] % count or shape[1] == 0:
        raise ValueError(
            f"{name}: shape {list(shape)}; allowed: [T, heads, dim], heads a multiple of {count}, "
            "the shards"
        )
    size = shape[1] // count
    return given[:, part * size : (part + 1) * size]


def _layers(options: SessionOptions) -> list[SessionLayer]:
    layers = options.get("layers")
    return [] if layers is None else arguments.items("layers", layers, "a list of SessionLayer")


def _windowed(model: Model, options: SessionOptions) -> bool:
    layers = _layers(options) or [SessionLayer()]
    for index, layer in enumerate(layers):
        if layer.cross or layer.latent:
            kind = "cross" if layer.cross else "latent"
            raise ValueError(
                f"layers[{index}].{kind}: True with shards by context; allowed: False, as its keys "
                "are at one server"
            )
    return any(model.window if each.window is None else each.window for each in layers)


def _with_layers(options: SessionOptions, layers: Sequence[SessionLayer]) -> SessionOptions:
    changed = options.copy()
    if layers:
        changed["layers"] = layers
    return changed


def _with_room(options: SessionOptions, count: int) -> SessionOptions:
    """Each part is promised its share, and may grow to the whole."""
    changed = options.copy()
    promised = options.get("reserved_tokens") or options["max_tokens"]
    promised = arguments.integer("reserved_tokens", promised, 1, MOST_TOKENS)
    changed["reserved_tokens"] = -(-promised // count)
    return changed


def _heads_of(layer: SessionLayer, count: int, part: int) -> SessionLayer:
    if layer.sinks is None:
        return layer
    size = len(layer.sinks) // count
    if size * count != len(layer.sinks):
        raise arguments.refused("layers.sinks", layer.sinks, f"a multiple of {count}, the shards")
    return replace(layer, sinks=layer.sinks[part * size : (part + 1) * size])


def _sinks_once(layers: Sequence[SessionLayer], model: Model, part: int) -> list[SessionLayer]:
    """Sinks are of the first part alone: each would count its own otherwise."""
    if part == 0 or not (model.sinks or any(each.sinks is not None for each in layers)):
        return list(layers)
    none = [-np.inf] * model.num_heads
    return [replace(each, sinks=none) for each in layers or [SessionLayer()]]
