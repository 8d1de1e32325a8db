"""Mixtures of experts, computed so that a graph can be made of them.

Transformers lets the part that runs the chosen experts be replaced by a function
(`ExpertsInterface`). Its own either take as many steps as there are experts that were chosen, which
no graph of fixed nodes can say, or gather the parameters anew for each token. Here every expert
computes every token, and what was not chosen counts 0.
"""

from typing import Any

import torch
from torch import Tensor, nn


def every_expert(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The weighted sum of the chosen experts' outputs: [T, E].

    Args:
        experts: the module, as transformers' `use_experts_implementation` describes it.
        hidden_states: [T, E].
        top_k_index: [T, K], the experts of each token.
        top_k_weights: [T, K], what their outputs are multiplied by.
    """
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    count = getattr(experts, first).shape[0]
    total = torch.zeros_like(hidden_states)
    for expert in range(count):
        chosen = torch.where(top_k_index == expert, top_k_weights, torch.zeros_like(top_k_weights))
        inner = _linear(experts, first, expert, hidden_states)
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        made = _linear(experts, "down_proj", expert, inner)
        if experts.has_post_expert_norm:
            made = experts.post_expert_norm(made)
        total = total + made * chosen.sum(dim=-1, keepdim=True)
    return total.to(hidden_states.dtype)


def _linear(experts: Any, name: str, expert: int, given: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return nn.functional.linear(given, weight.T if experts.is_transposed else weight, bias)
