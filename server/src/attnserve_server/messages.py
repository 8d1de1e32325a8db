"""Loaded models, limits and arrays to messages."""

import json

import numpy as np
from attnserve_proto import attention_pb2 as pb
from attnserve_proto.manifest import ModelInput

from attnserve_server import dtypes
from attnserve_server.dtypes import Array
from attnserve_server.models.catalog import CatalogEntry
from attnserve_server.models.store import LoadedModel
from attnserve_server.settings import Limits


def model_message(model: LoadedModel) -> pb.Model:
    """A model's description."""
    manifest, attention = model.manifest, model.manifest.attention
    message = pb.Model(
        name=manifest.name,
        version=str(manifest.version),
        kind=pb.ModelKind.Value(manifest.kind.upper()),
        dtype=dtypes.number_of(manifest.dtype),
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        value_head_dim=attention.value_head_dim,
        mask=pb.MaskKind.Value(attention.mask.upper()),
        window=attention.window or 0,
        scale=attention.scale,
        softcap=attention.softcap,
        takes_text=model.tokenizer is not None,
        source=manifest.source["description"],
        window_right=attention.window_right or 0,
        has_window_right=attention.window_right is not None,
        bottom_right=attention.alignment == "bottom-right",
        alibi=attention.alibi,
        chunk=attention.chunk or 0,
        sinks=attention.sinks or (),
        rotary=attention.rotary.style if attention.rotary else "",
    )
    if manifest.layer is not None:
        message.embed_dim = manifest.layer.embed_dim
    if manifest.transformer is not None:
        message.embed_dim = manifest.transformer.hidden_size
        message.num_layers = manifest.transformer.num_layers
        message.vocab_size = manifest.transformer.vocab_size
        message.max_seq_len = manifest.transformer.max_seq_len
        message.token_types = manifest.transformer.token_types
        message.max_text_len = manifest.transformer.texts.max_len or 0
        message.takes_ids = manifest.transformer.takes_ids
        message.inputs.extend(map(input_message, manifest.transformer.inputs))
        for described in manifest.transformer.attentions:
            message.attentions.add(
                name=described.name,
                num_layers=len(described.layers),
                num_heads=described.num_heads,
                num_kv_heads=described.num_kv_heads,
                head_dim=described.head_dim,
                mask=pb.MaskKind.Value(described.mask.upper()),
                windows=[layer.window or 0 for layer in described.layers],
            )
    for variant in model.variants:
        entry = variant.entry
        message.variants.add(
            name=entry.name,
            inputs=entry.input_names,
            outputs=entry.output_names,
            providers=entry.providers,
            max_abs_error=entry.verification.largest_error,
            tolerance=entry.verification.tolerance,
            quadratic_memory=entry.memory == "quadratic",
        )
    return message


def input_message(entry: ModelInput) -> pb.ModelInput:
    """A tensor that a transformer takes in the place of token ids."""
    message = pb.ModelInput(
        name=entry.name,
        dtype=dtypes.number_of(entry.dtype),
        shape=[-1 if isinstance(size, str) else size for size in entry.shape],
        tokens=entry.tokens or 0,
        frames_per_token=entry.frames_per_token or 0,
    )
    if entry.patches is not None:
        patches = entry.patches
        message.patches.first = patches.first
        message.patches.rows, message.patches.columns = patches.rows, patches.columns
    if entry.preprocessor is not None:
        message.preprocessor_json = json.dumps(entry.preprocessor)
    return message


def unavailable_message(entry: CatalogEntry) -> pb.UnavailableModel:
    """A version that is not served."""
    return pb.UnavailableModel(name=entry.name, version=str(entry.version), reason=entry.reason)


def limits_message(limits: Limits) -> pb.Limits:
    """What the server accepts."""
    return pb.Limits(
        max_message_bytes=limits.max_message_bytes,
        max_request_bytes=limits.max_request_bytes,
        max_response_bytes=limits.max_response_bytes,
        max_seq_len=limits.max_seq_len,
        max_batch=limits.max_batch,
        chunk_bytes=limits.chunk_bytes,
        max_queue=limits.max_queue,
        max_stored_bytes=limits.max_stored_bytes,
        max_session_bytes=limits.max_kv_bytes,
        session_page_tokens=limits.kv_page_tokens,
    )


def data(array: Array) -> memoryview:
    """The elements of an array as bytes, without a copy if it is contiguous."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return memoryview(flat.view(np.uint8))  # type: ignore[arg-type]


def tensor_message(array: Array) -> pb.Tensor:
    """A whole tensor, elements included."""
    return pb.Tensor(
        dtype=dtypes.from_numpy(array.dtype), shape=array.shape, data=data(array).tobytes()
    )
