"""The tensors that a model takes and gives, by the names of the Open Inference Protocol."""

from dataclasses import dataclass

from attnserve_proto.manifest import Manifest

from attnserve_server.models.store import LoadedModel


@dataclass(frozen=True, slots=True)
class Port:
    """One tensor; a dimension of -1 may have any size. The first is the batch, or broadcasts."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


def inputs(model: LoadedModel) -> list[Port]:
    """What a model takes."""
    manifest = model.manifest
    attention, dtype = manifest.attention, manifest.dtype
    if manifest.transformer is not None:
        ports = [
            Port("input_ids", "INT64", (-1, -1)),
            Port("attention_mask", "INT64", (-1, -1), optional=True),
        ]
        if manifest.transformer.token_types:
            ports.append(Port("token_type_ids", "INT64", (-1, -1), optional=True))
        return ports
    if manifest.layer is None:
        kv_heads = attention.num_kv_heads
        ports = [
            Port("query", dtype, (-1, attention.num_heads, -1, attention.head_dim)),
            Port("key", dtype, (-1, kv_heads, -1, attention.head_dim)),
            Port("value", dtype, (-1, kv_heads, -1, attention.value_head_dim)),
        ]
    else:
        ports = [Port("hidden_states", dtype, (-1, -1, manifest.layer.embed_dim))]
        if manifest.layer.context_dim is not None:
            ports.append(Port("context", dtype, (-1, -1, manifest.layer.context_dim)))
    taken = {name for variant in model.attending for name in variant.entry.input_names}
    if "key_lengths" in taken:
        ports.append(Port("key_lengths", "INT64", (-1,), optional=True))
    if "bias" in taken:
        ports.append(Port("bias", dtype, (-1, -1, -1, -1), optional=True))
    if "sinks" in taken:
        ports.append(Port("sinks", "FP32", (attention.num_heads,), optional=True))
    ports += [
        Port(name, "INT64", (-1,), optional=True)
        for name in ("prefix_lengths", "cu_seqlens_q", "cu_seqlens_k")
        if name in taken
    ]
    return ports


def outputs(model: LoadedModel) -> list[Port]:
    """What a model gives; the first one if nothing is asked for by name."""
    manifest = model.manifest
    given = {name for variant in model.attending for name in variant.entry.output_names}
    if manifest.transformer is not None:
        return _of_transformer(manifest, given)
    heads, dtype = manifest.attention.num_heads, manifest.dtype
    if manifest.layer is None:
        output = Port("output", dtype, (-1, heads, -1, manifest.attention.value_head_dim))
    else:
        output = Port("output", dtype, (-1, -1, manifest.layer.embed_dim))
    ports = [output]
    if "weights" in given:
        ports.append(Port("weights", dtype, (-1, heads, -1, -1)))
    if given & {"weights", "entropy"}:
        ports += [
            Port("entropy", "FP32", (-1, heads, -1)),
            Port("top_k_indices", "INT64", (-1, heads, -1, -1)),
            Port("top_k_weights", "FP32", (-1, heads, -1, -1)),
            Port("mass_per_key", "FP32", (-1, heads, -1)),
            Port("mass_by_distance", "FP32", (-1, heads, -1)),
        ]
    if "log_sum_exp" in given:
        ports.append(Port("log_sum_exp", "FP32", (-1, heads, -1)))
    return ports


def _of_transformer(manifest: Manifest, given: set[str]) -> list[Port]:
    transformer = manifest.transformer
    assert transformer is not None
    ports = [Port("last_hidden_state", manifest.dtype, (-1, -1, transformer.hidden_size))]
    if transformer.pooling is not None:
        ports.append(Port("pooled", "FP32", (-1, transformer.hidden_size)))
    if transformer.has_target:
        return ports  # three attentions: AttendTokens tells them apart
    attention = transformer.attentions[0]
    shape = (-1, attention.num_heads, -1, -1)
    return ports + [
        Port(f"weights_{layer}", "FP32", shape)
        for layer in range(transformer.num_layers)
        if given & {f"weights_{layer}", f"{attention.name}_query_{layer}"}
    ]
