"""Hugging Face transformers with attention and KV cache in a server, the rest where they were.

>>> import attnserve_client.transformers
>>> attnserve_client.transformers.connect("127.0.0.1:8001")
>>> model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="attnserve")
>>> model.generate(**tokenizer(prompts, return_tensors="pt", padding=True))

Importing this module makes that implementation known. A model's attention needs a served core model
of its heads, dimensions and dtype, with the variant `paged`; where there is none, the error gives
the command that exports it. Windows are the sessions' own, another scale is multiplied into the
query, sinks are taken off by the log-sum-exp. `generate` is called as ever, for batches of ragged
prompts, beams, samples and with assistants too. Padding is not sent.

`attend_images` and `attend_sounds` run pictures and sounds through a served model that reads them,
made ready as its checkpoint says.

Decoders whose layers attend causally, to all keys or within a window: GPT-2, Llama, Mistral, Qwen,
Gemma 3, gpt-oss and others. No gradients, no attention weights.
"""

import grpc

from attnserve_client._transformers_attention import register
from attnserve_client._transformers_cache import SessionCache, make_caches_sessions
from attnserve_client._transformers_inputs import (
    attend_images,
    attend_sounds,
    image_inputs,
    sound_inputs,
)
from attnserve_client._transformers_service import Service, current

__all__ = [
    "SessionCache",
    "attend_images",
    "attend_sounds",
    "connect",
    "image_inputs",
    "sound_inputs",
]


def connect(
    target: str,
    *,
    model: str = "",
    cache_dtype: str | None = None,
    reserved_tokens: int = 1024,
    lease: float | None = None,
    credentials: grpc.ChannelCredentials | None = None,
) -> None:
    """Name the server, once; without it, the variable ATTNSERVE_TARGET does.

    Caches that there are stay with the server that was named before.

    Args:
        target: `host:port`, or any target that grpc understands.
        model: the served core model to use; empty: one that fits, of the same scale if there is.
        cache_dtype: what keys and values are kept as: "fp32", "fp16", "bf16", "int8" or "fp8"; None
            is as the model.
        reserved_tokens: tokens that each sequence is promised room for when it begins (its prompt,
            if that is longer). A longer one may find the server full: ResourceExhaustedError.
        lease: seconds that a cache is kept after its last use; None is the server's default.
        credentials: for TLS; None is a plaintext channel.
    """
    current.set(
        Service(
            target,
            model=model,
            cache_dtype=cache_dtype,
            reserved_tokens=reserved_tokens,
            lease=lease,
            credentials=credentials,
        )
    )


register()
make_caches_sessions()
