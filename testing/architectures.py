"""Tiny random checkpoints of any architecture of the installed transformers, made generically.

A configuration's defaults are shrunk by what its fields are called; nothing here knows a model.
"""

import copy
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from attnserve_export.checkpoints.families import input_of
from attnserve_export.checkpoints.sources import source_of
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

VOCABULARY, POSITIONS, WIDTH, HEADS, HEAD_DIM, WINDOW, LAYERS = 96, 64, 32, 4, 8, 7, 2

# The first that fits a field's name says what an integer becomes; None: it stays.
_SIZES: tuple[tuple[str, int | None], ...] = (
    (r"_layer_period$", 2),
    (r"_layer_offset$", 1),
    (r"mamba_(n|num)_heads|mamba_d_head|mamba_head_dim|rotary_dim$", 8),
    (r"mamba_d_ssm", 64),
    (r"^attention_window$", 8),
    (r"^qk_head_dim$", 16),
    (r"index_k?pool", 4),
    (r"^groups$|num_groups|n_groups$", 2),
    (r"token_id$|_index$|_idx$|^pad|^(bos|eos|sep|cls|mask|unk)_|version|_id$", None),
    (r"vocab(ulary)?_size|num_embeddings|^n_vocab$|entity_vocab", VOCABULARY),
    (
        r"max_(\w+_)?positions?(_embeddings)?$|n_positions|n_ctx|max_seq|seq_length|context_length"
        r"|max_sequence|max_target|max_source|block_size$",
        POSITIONS,
    ),
    (r"window|attention_chunk|local_attention|chunk_size", WINDOW),
    (r"index_topk|topk_(tokens|blocks)|index_block", 8),
    (r"num_(key_value|kv)_heads|n_kv_heads|num_kv|key_value_heads|num_key_value", 2),
    (
        r"(num|n)_\w*heads$|n_heads?$|attention_heads$|num_heads|encoder_attention_heads"
        r"|^n_head$|heads$",
        HEADS,
    ),
    (r"head_dim|d_kv|kv_channels|head_size|d_head|(qk|v)_\w*head_dim", HEAD_DIM),
    (
        r"num_experts_per_tok|moe_top_?k|num_selected|moe_k|top_k_experts|experts_top_?k"
        r"|^top_k$|topk_group",
        2,
    ),
    (r"^n_group$|num_expert_group", 2),
    (r"num_\w*experts|n_\w*experts|num_shared", 4),
    (r"num_mem_blocks|num_hidden_groups|inner_group_num", 1),
    (r"layers$|n_layers?|num_blocks|depth$|num_layers|\w*_layers$|num_hidden_layers", LAYERS),
    (r"lora_rank|_rank$", 8),
    (
        r"intermediate|ffn_dim|ffn_hidden|d_ff|n_inner|hidden_dim$|feed_forward|mlp_dim|inner_dim"
        r"|shared_expert|expert_ffn|ffn_size",
        48,
    ),
    (
        r"hidden_size|d_model|n_embd|embed_dim|embedding_size|^dim$|emb_dim|model_dim|embd|width"
        r"|_dim$|projection_size",
        WIDTH,
    ),
    (r"image_size", 16),
    (r"patch_size", 8),
    (r"state_size|d_state|ssm_state", 8),
)


# Sizes that defaults leave open.
_LEFT_OPEN: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 48,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCABULARY,
    "mask_token_id": 5,
    "pad_token_id": 0,
    "layer_types": ["full_attention", "full_attention"],
}


def model_types() -> list[str]:
    """All that a config.json can say, in order."""
    return sorted(CONFIG_MAPPING.keys())


def model_class_of(model_type: str) -> Any:
    """The class without a head for any task; None: there is none."""
    found = MODEL_MAPPING.get(CONFIG_MAPPING[model_type], None)
    return found[0] if isinstance(found, (tuple, list)) else found


def tiny_config(model_type: str, *, whole: bool = False) -> Any:
    """A configuration with two layers, 32 wide.

    Args:
        model_type: of it.
        whole: whether sizes that the defaults leave open are filled in.
    """
    return _shrunk(CONFIG_MAPPING[model_type], whole)


def _shrunk(config_class: Any, whole: bool) -> Any:
    default = config_class()
    given: dict[str, Any] = {}
    content = default.to_dict()
    layers = next((content[name] for name in ("num_hidden_layers", "n_layer", "num_layers")
                   if isinstance(content.get(name), int)), None)  # fmt: skip
    rotary = HEAD_DIM
    for name, value in content.items():
        if name in ("transformers_version", "model_type", "architectures", "dtype", "torch_dtype"):
            continue
        if re.search(r"^_?out_(features|indices)$|^stage_names$", name):  # which layers are outputs
            continue
        nested = default.__dict__.get(name)
        if isinstance(nested, transformers.PreTrainedConfig):
            given[name] = _shrunk(type(nested), whole).to_dict()
        elif isinstance(value, list) and layers is not None and len(value) == layers > LAYERS:
            kinds = all(isinstance(entry, str) for entry in value)
            given[name] = _kinds(value) if kinds else [_value(name, entry) for entry in value[:2]]
        elif name == "per_layer_config" and isinstance(value, dict) and value:
            entry = next(iter(value.values()))
            given[name] = {LAYERS - 1: {key: _value(key, each) for key, each in entry.items()}}
        elif whole and value is None and name in _LEFT_OPEN:
            given[name] = _LEFT_OPEN[name]
        else:
            given[name] = _value(name, value)
    parameters = given.get("rope_parameters")
    if isinstance(parameters, dict):
        factor = parameters.get("partial_rotary_factor", given.get("partial_rotary_factor"))
        rotary = int(HEAD_DIM * (factor if isinstance(factor, float) else 1.0))
        if whole and not any(isinstance(entry, dict) for entry in parameters.values()):
            parameters.setdefault("mrope_section", [])
        _sections(parameters, rotary // 2)
    _keep_together(given, content)
    return config_class(**given)


def _sections(parameters: dict[str, Any], total: int) -> None:
    """Of angles, by which of three positions they turn."""
    for entry in (parameters, *(e for e in parameters.values() if isinstance(e, dict))):
        if isinstance(entry.get("mrope_section"), list):
            third = total // 3
            entry["mrope_section"] = [
                total - 2 * max(third, total > 2),
                *[max(third, total > 2)] * 2,
            ]
            if total <= 2:
                entry["mrope_section"] = [total - 1, 1, 0]


def _value(name: str, value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return _integer(name, value)
    if isinstance(value, list) and re.search(
        r"layer_types|layers_block_type|mlp_layer_types|"
        r"layers?_type|block_types",
        name,
    ):
        return _kinds(value)
    if isinstance(value, dict) and "rope" in name:
        return _rope(value)
    return copy.deepcopy(value)


def _integer(name: str, value: int) -> int:
    for pattern, size in _SIZES:
        if re.search(pattern, name):
            if size is None:
                return value if value < VOCABULARY else 3
            return min(value, size) if value > 0 else value
    return value


def _kinds(value: list[Any]) -> list[Any]:
    """Of two layers: of different kinds where the default has several."""
    kinds = list(dict.fromkeys(map(str, value)))
    if len(kinds) <= 1:
        return value[:LAYERS]
    # Attention first, if there is anything else.
    kinds.sort(key=lambda kind: "full" in kind or kind == "attention")
    return kinds[-LAYERS:]


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    made = copy.deepcopy(value)
    for name, entry in made.items():
        if isinstance(entry, dict):
            made[name] = _rope(entry)
    if "original_max_position_embeddings" in made:
        made["original_max_position_embeddings"] = POSITIONS // 4
    return made


def _keep_together(given: dict[str, Any], content: dict[str, Any]) -> None:
    """What only fits together."""
    for name in given:
        every = content[name] is not None and content[name] == content.get("num_attention_heads")
        if every and re.search(r"num_(key_value|kv)_heads$", name):
            given[name] = HEADS
    for name in given:  # which of many layers attend
        if re.search(r"(attn|attention)_layer(s_idx|_indices|_ids)$", name) and given[name]:
            given[name] = [1]
    if isinstance(given.get("attention_types"), list):  # GPT Neo's: kinds, and how often
        given["attention_types"] = [[["global", "local"], LAYERS // 2]]


def write_checkpoint(model_type: str, folder: Path, seed: int = 0) -> None:
    """Random parameters, larger than those that training starts from.

    Raises:
        Exception: of transformers: no configuration that was tried makes a model.
    """
    torch.manual_seed(seed)
    model = _tiny_model(model_type)
    randomize(model)
    model.save_pretrained(folder)


def _tiny_model(model_type: str) -> Any:
    """One that runs, if there is one; otherwise one that could be made."""
    made: list[Any] = []
    failure: Exception | None = None
    for whole in (False, True):
        try:
            config = tiny_config(model_type, whole=whole)
            model = model_class_of(model_type)(config).float().eval()
            made.append(model)
            ids = torch.full((2, 9), 4)
            more = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
            takes = input_of(type(model))
            given = ids
            if takes != "input_ids":
                given = torch.randn(2, *map(int, source_of(model, config, takes).shape))
            with torch.no_grad():
                model(**{takes: given}, **more)
            return model
        except Exception as error:  # whatever a model may raise
            failure = failure or error
    if not made:
        assert failure is not None
        raise failure
    return made[0]


def randomize(model: torch.nn.Module) -> None:
    """Give parameters a size at which every one of them matters."""
    norms = {
        id(parameter)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            if id(parameter) in norms or parameter.ndim <= 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" in name or "wte" in name:
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(std=min(1.0, parameter.shape[-1] ** -0.5))
