"""Attention and masks as transformers calls them, computed in a server."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_causal_mask_function,
)

from attnserve_client._transformers_cache import NAME, take_new_keys
from attnserve_client._transformers_sequences import Attention, Sequences
from attnserve_client._transformers_service import current


def register() -> None:
    """Make `attn_implementation="attnserve"` known."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    output_attentions: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention, as transformers' `AttentionInterface` has it.

    With a `SessionCache` the new keys and values go into its sessions, else into ones that end with
    the call.

    Args:
        query: [B, H, S, D].
        key, value: [B, Hkv, S, D] and [B, Hkv, S, Dv].
        attention_mask: what `mask` gave.
        scaling: of the scores; None: 1/sqrt(D).
        sliding_window: keys up to its own that a query sees; None: all.
        s_aux: [H], sinks.
        The others: refused unless they are as a causal decoder has them, without training.

    Returns:
        [B, S, H, Dv], and None: there are no weights.

    Raises:
        AttnserveError: the server refused it.
        ValueError: it cannot be had.
    """
    keys = take_new_keys()
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        _refuse_not_causal()
    if dropout:
        _refuse(f"dropout {dropout}", "0, as in model.eval()")
    if position_bias is not None:
        _refuse("a bias of the scores", "none")
    if output_attentions:
        _refuse("output_attentions", "False: weights are not sent back")
    if keys is None and key.shape[2] != query.shape[2]:
        _refuse(
            "a cache that holds tensors",
            "none given, or attnserve_client.transformers.SessionCache(config=model.config)",
        )
    if keys is not None and keys.shape != key.shape:
        _refuse("keys changed after the cache had them", "models that give them as they are")
    asked = Attention(
        query,
        key,
        value,
        attention_mask,
        query.shape[3] ** -0.5 if scaling is None else float(scaling),
        sliding_window or 0,
        softcap or 0.0,
        s_aux,
    )
    with torch.no_grad():
        if keys is not None:
            output = keys.sequences.attend(keys.layer, asked)
        else:
            alone = Sequences(current.get(), [sliding_window or 0])
            try:
                output = alone.attend(0, asked)
            finally:
                alone.close()
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        output = _WithoutGradient.apply(  # type: ignore[no-untyped-call]
            output, query, key, value
        )
    return output, None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    *,
    config: PreTrainedConfig,
    use_vmap: bool = False,
    **_: Any,
) -> torch.Tensor | None:
    """What says where the padding is, as transformers' `AttentionMaskInterface` has it.

    Causality and windows are the server's business.

    Returns:
        [B, kv_length] bool, or None without padding.

    Raises:
        ValueError: keys are seen by another rule than causality and the model's window.
    """
    if mask_function is bidirectional_mask_function:
        _refuse_not_causal()
    if mask_function is not causal_mask_function:
        _check_rule(mask_function, batch_size, q_length, kv_length, q_offset, config, use_vmap)
    return attention_mask


def _check_rule(
    mask_function: Callable[..., Any],
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    config: PreTrainedConfig,
    use_vmap: bool,
) -> None:
    rows = torch.arange(batch_size)[:, None, None, None]
    heads = torch.zeros(1, dtype=torch.long)
    queries = torch.arange(q_offset, q_offset + q_length)[:, None]
    places = (rows, heads, queries, torch.arange(kv_length))
    window = getattr(config, "sliding_window", None)
    known: list[Callable[..., Any]] = [causal_mask_function]
    if window:
        known.append(sliding_window_causal_mask_function(window))
    if not use_vmap:  # others may be unfit for tensors
        seen = mask_function(*places)
        if any(bool((rule(*places) == seen).all()) for rule in known):
            return
    _refuse("keys that are seen by a rule of its own", "causality, and the model's window")


def _refuse_not_causal() -> None:
    _refuse(
        "attention that is not causal",
        f"causal; for a model of several parts: attn_implementation={{'text_config': {NAME!r}}}",
    )


def _refuse(what: str, allowed: str) -> None:
    raise ValueError(f"attn_implementation={NAME!r}: {what}; allowed: {allowed}")


class _WithoutGradient(torch.autograd.Function):
    """Passes an output on, and says that it has no gradient to whoever wants one."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        """`inputs`: what it was computed from."""
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """There is none."""
        raise RuntimeError(
            f"attn_implementation={NAME!r} has no gradients; train with another one, such as 'sdpa'"
        )
