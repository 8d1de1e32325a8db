"""What a live page shows: a text becomes maps without weights, whose layers come one by one.

A layer travels as one deflated block of little-endian numbers: effective keys [H, Sq], visible keys
[Sq], received weight [H, Sk] and the six measures of `per_head` [H] each (NaN where there is none),
all float32; then `encoding.layer_bytes` and `encoding.thumbnail_bytes`.
"""

import itertools
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from attnserve_client import AttentionClient, Model

from attnserve_lens import encoding
from attnserve_lens.asking import heads_at_once, layer_of, sequence_of
from attnserve_lens.attention import AttentionMap, Axes, axes_of, left_to_sink
from attnserve_lens.documents import joined
from attnserve_lens.measures import measure, per_head
from attnserve_lens.page import cut, describe

# A line between documents.
_BETWEEN = re.compile(r"^[ \t]*---[ \t]*$", re.MULTILINE)

# Maps and packed layers that are kept: the oldest go.
_MAPS, _BYTES = 64, 256 << 20


@dataclass(frozen=True, slots=True)
class _Asked:
    """A map that a page knows: what its layers are asked for with.

    Attributes:
        ids, types: of each document.
        target: ids that a decoder reads.
        bits: of a code, see `encoding`.
        sunk: layers that have learned sinks.
    """

    model: str
    attention: str
    axes: Axes
    ids: tuple[tuple[int, ...], ...]
    types: tuple[tuple[int, ...], ...]
    target: tuple[int, ...]
    bits: int
    sunk: frozenset[int]


class Viewer:
    """Looks at the models of a server; for several threads.

    Args:
        client: connected.
        timeout: seconds of each request.
    """

    def __init__(self, client: AttentionClient, timeout: float) -> None:
        self._client, self._timeout = client, timeout
        self._lock, self._numbers = threading.Lock(), itertools.count()
        self._maps: OrderedDict[str, _Asked] = OrderedDict()
        self._packed: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._looks: OrderedDict[tuple[str, ...], dict[str, Any]] = OrderedDict()

    def models(self) -> list[dict[str, Any]]:
        """The transformer models that take text: their names, and whether they have a decoder.

        Raises:
            AttnserveError: the server refused.
        """
        listed = self._client.list_models(timeout=self._timeout)
        named = {each.name: each for each in listed if each.kind == "transformer"}
        return [
            {"name": name, "target": _takes_target(model)}
            for name, model in sorted(named.items())
            if model.takes_text and (model.takes_ids or not model.inputs)
        ]

    def look(self, model: str, text: str, pair: str = "", target: str = "") -> dict[str, Any]:
        """Tokens of a text, and the maps that there are to see.

        Args:
            model: its name.
            text, pair: what is read; a pair makes one sequence with the text. Lines of `---` alone
                are between documents, which are shown as packed: none of them sees another.
            target: what the decoder of an encoder-decoder reads.

        Returns:
            What the page's script must know of the sequence, without measures; the same again for
            the same text, so that layers which are here need not be asked for again.

        Raises:
            AttnserveError: the server refused.
            ValueError: there is no text, or there are several where one is allowed.
        """
        documents = [each for each in _BETWEEN.split(text) if each.strip()]
        if not documents:
            raise ValueError("text: empty; allowed: any text")
        asked = self._client.get_model(model, timeout=self._timeout)
        # The manifest holds the hashes of the model's files: another model is another look.
        key = (asked.manifest, text, pair, target)
        with self._lock:
            known = self._looks.get(key)
            if known is not None and all(each["name"] in self._maps for each in known["maps"]):
                return known
        if len(documents) > 1 and (pair or _takes_target(asked)):
            why = "as one of a pair" if pair else "for a model with a decoder beside its text"
            raise ValueError(f"text: {len(documents)} documents; allowed: one, {why}")
        found = self._client.attend_tokens(
            [(documents[0], pair)] if pair else documents,
            model=model,
            targets=[target] if target else None,
            return_hidden=False,
            return_weights=False,
            truncate=True,
            timeout=self._timeout,
        )
        facts = f"model {found.model}, version {found.version}"
        if any(found.truncated) or any(found.target_truncated):
            facts += "; text was cut to what the model takes"
        maps = []
        several, sunk_layers = len(asked.attentions) > 1, _sunk_layers(asked)
        for each in asked.attentions or (asked,):
            name = each.name if several else ""
            layers, heads = tuple(range(each.num_layers)), tuple(range(each.num_heads))
            sunk = sunk_layers.get(each.name, frozenset())
            axes = joined(
                [axes_of(found, name, layers, heads, n) for n in range(len(documents))],
                sink=bool(sunk),
            )
            bits = encoding.code_bits(len(axes.heads) * len(axes.queries) * len(axes.keys))
            ids, types = tuple(map(tuple, found.ids)), tuple(map(tuple, found.token_type_ids))
            targets = tuple(found.target_ids[0] if target else ())
            named = self._keep(_Asked(model, name, axes, ids, types, targets, bits, sunk))
            maps.append(describe(axes, named, bits))
        shown = cut(text if not pair else f"{text} {pair}")
        found_there = {"name": shown, "facts": facts, "maps": maps}
        with self._lock:
            self._looks[key] = found_there
            if len(self._looks) > _MAPS:
                self._looks.popitem(last=False)
        return found_there

    def answers(self, name: str) -> int:
        """How many answers of the server a layer of a map takes.

        Raises:
            AttnserveError: the server refused.
        """
        asked = self._maps[name]
        return len(asked.ids) * -(-len(asked.axes.heads) // self._at_once(asked))

    def layer(self, name: str, layer: int, step: Callable[[], None] = lambda: None) -> bytes:
        """A layer of a map, packed as is said above.

        Args:
            name: of the map, as `look` gave it.
            layer: its place among the map's layers.
            step: called after each answer of the server.

        Raises:
            AttnserveError: the server refused.
            ValueError: there is no such map or layer.
        """
        with self._lock:
            asked = self._maps.get(name)
            packed = self._packed.get((name, layer))
        if asked is None:
            raise ValueError("map: not known here any more; look at the text again")
        if not 0 <= layer < len(asked.axes.layers):
            raise ValueError(f"layer: {layer}; allowed: 0..{len(asked.axes.layers) - 1}")
        if packed is None:
            packed = self._pack(asked, layer, step)
            with self._lock:
                self._packed[name, layer] = packed
                while sum(map(len, self._packed.values())) > _BYTES and len(self._packed) > 1:
                    self._packed.popitem(last=False)
        return packed

    def _at_once(self, asked: _Asked) -> int:
        longest = max(*map(len, asked.ids), len(asked.target))
        return heads_at_once(self._client, longest, self._timeout)

    def _pack(self, asked: _Asked, layer: int, step: Callable[[], None]) -> bytes:
        axes = asked.axes
        at_once = self._at_once(asked)
        weights = np.zeros((len(axes.heads), len(axes.queries), len(axes.keys)), np.float32)
        firsts = axes.documents or ((0, 0),)
        for (query, key), ids, types in zip(firsts, asked.ids, asked.types, strict=True):
            own, _ = layer_of(
                self._client,
                sequence_of(ids, types),
                asked.target,
                model=asked.model,
                attention=asked.attention,
                layer=axes.layers[layer],
                heads=axes.heads,
                at_once=at_once,
                timeout=self._timeout,
                step=step,
            )
            weights[:, query : query + own.shape[1], key : key + own.shape[2]] = own
        if axes.layers[layer] in asked.sunk:
            weights[..., -1] = left_to_sink(weights)
        shown = AttentionMap.of(replace(axes, layers=(layer,)), weights[None])
        measures = measure(shown)
        nothing = np.full((1, len(axes.heads)), np.nan)
        floats = [measures.effective, measures.visible, measures.received]
        floats += [nothing if each is None else each for each in per_head(measures).values()]
        content = b"".join(each.astype("<f4").tobytes() for each in floats)
        content += encoding.layer_bytes(weights, asked.bits)
        content += encoding.thumbnail_bytes(shown.weights)
        # It goes no further than this machine: fast is better than small.
        return encoding.deflate(content, 1)

    def _keep(self, asked: _Asked) -> str:
        with self._lock:
            name = f"m{next(self._numbers)}"
            self._maps[name] = asked
            if len(self._maps) > _MAPS:
                gone, _ = self._maps.popitem(last=False)
                for key in [key for key in self._packed if key[0] == gone]:
                    del self._packed[key]
        return name


def _takes_target(model: Model) -> bool:
    return any(each.name == "cross" for each in model.attentions)


def _sunk_layers(model: Model) -> dict[str, frozenset[int]]:
    """Of each attention, by its name, the layers that have learned sinks: the manifest says so."""
    attentions = json.loads(model.manifest)["transformer"]["attentions"]
    return {
        each["name"]: frozenset(n for n, layer in enumerate(each["layers"]) if layer.get("sinks"))
        for each in attentions
    }
