"""Derives a model's architecture from its config.json, and refuses in a sentence what is not of the common kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_core.errors import ModelUnsupported
from qlora_core.estimate.architecture import Architecture, Experts, Layer, Linear
from qlora_core.estimate.families import FAMILIES, LLAMA, Family, Switch

_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
# Their presence means that a layer is made otherwise than the common decoder's.
_OTHERWISE = (
    "kv_lora_rank", "mamba_d_state", "state_size", "ssm_state_size", "linear_num_value_heads", "attn_layer_period",
    "altup_num_inputs", "block_types", "compress_ratios", "encoder_layers", "num_kv_shared_layers",
    "swiglu_limit", "first_k_dense_replace", "n_shared_experts",
)  # fmt: skip
_DROPOUTS = ("attention_dropout", "residual_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout")
_MULTIMODAL = ("text_config", "vision_config", "audio_config", "thinker_config")
_MOST = 2**31 - 1
# More of either than any model has would only make the estimate slow.
_MOST_LAYERS = 1000
_MOST_EXPERTS = 4096


def describe(config: Mapping[str, Any], source: str) -> Architecture:
    """Derive the architecture from the fields of a config.json.

    Args:
        config: the fields.
        source: what to call it in messages.

    Raises:
        ModelUnsupported: a field is missing or no possible number, or the model is no decoder of the common kind.
    """
    model_type = str(config.get("model_type", "unknown"))
    _refuse_other_kinds(config, source, model_type)
    family = FAMILIES.get(model_type)
    assumed: tuple[str, ...] = ()
    if family is None:
        family = _guess(config)
        assumed = (
            f"{model_type} is not known here and taken for a decoder like Llama's, which may be a third off",
        )
    dropouts = [name for name in _DROPOUTS if config.get(name)]
    if dropouts:
        assumed += (f"what the model's own {', '.join(dropouts)} keeps is not counted",)
    numbers = _Numbers(config, source)
    hidden, heads = numbers.take("hidden_size"), numbers.take("num_attention_heads")
    head_dim = numbers.take("head_dim", default=hidden // heads)
    kv_heads = numbers.take("num_key_value_heads", default=heads)
    if (hidden % heads and not config.get("head_dim")) or heads % kv_heads:
        raise ModelUnsupported(
            f"{source}: {heads} heads and {kv_heads} heads of keys do not go into a width of {hidden}"
        )
    n_layers = numbers.take("num_hidden_layers", most=_MOST_LAYERS)
    windows = _windows(config, numbers, family, n_layers)
    return Architecture(
        model_type=model_type,
        family=family,
        hidden=hidden,
        vocabulary=numbers.take("vocab_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=_rotary_dim(config, head_dim),
        tied=_tied(config, family),
        layers=tuple(
            _layer(
                config,
                numbers,
                family,
                index,
                window,
                (hidden, heads * head_dim, kv_heads * head_dim),
            )
            for index, window in enumerate(windows)
        ),
        alone_above=_alone_above(config),
        assumed=assumed,
    )


class _Numbers:
    """Takes whole numbers out of a config."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self._config, self._source = config, source

    def take(self, name: str, *, default: int | None = None, most: int = _MOST) -> int:
        value = self._config.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ModelUnsupported(
                f"{self._source}: {name} must be a whole number from 1 to {most:,}, not {value!r}"
            )
        return value


def _refuse_other_kinds(config: Mapping[str, Any], source: str, model_type: str) -> None:
    for name in _MULTIMODAL:
        if isinstance(config.get(name), Mapping):
            raise ModelUnsupported(
                f"{source} is of a multimodal model ({model_type} with a {name}), whose other parts cannot be "
                "estimated; give its text_config alone for the language model"
            )
    missing = [name for name in _NEEDED if config.get(name) is None]
    if missing:
        raise ModelUnsupported(
            f"{source} ({model_type}) is not of the common kind of decoder: it has no {', '.join(missing)}"
        )
    other = [name for name in _OTHERWISE if config.get(name)]
    if other and model_type not in FAMILIES:
        raise ModelUnsupported(
            f"{source} ({model_type}) is not of the common kind of decoder: it has {', '.join(other)}"
        )


def _guess(config: Mapping[str, Any]) -> Family:
    """Give Llama, or a mixture where the config has experts."""
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if config.get(name):
            width = "moe_intermediate_size"
            return Family(
                qkv_bias="attention_bias",
                o_bias="attention_bias",
                experts=name,
                expert_width=width if config.get(width) else "intermediate_size",
            )
    return LLAMA


def _layer(
    config: Mapping[str, Any],
    numbers: _Numbers,
    family: Family,
    index: int,
    window: int | None,
    widths: tuple[int, int, int],
) -> Layer:
    hidden, query, kv = widths
    qkv_bias, o_bias, mlp_bias = (
        _switched(config, switch) for switch in (family.qkv_bias, family.o_bias, family.mlp_bias)
    )
    linears = [
        Linear("self_attn.q_proj", query, hidden, qkv_bias),
        Linear("self_attn.k_proj", kv, hidden, qkv_bias),
        Linear("self_attn.v_proj", kv, hidden, qkv_bias),
        Linear("self_attn.o_proj", hidden, query, o_bias),
    ]
    if family.fused:
        linears = [
            Linear("self_attn.o_proj", hidden, query, o_bias),
            Linear("self_attn.qkv_proj", query + 2 * kv, hidden, qkv_bias),
        ]
    width = numbers.take("intermediate_size")
    experts = _experts(config, numbers, family, index)
    if experts is None:
        linears += _feed_forward("mlp", hidden, width, fused=family.fused, bias=mlp_bias)
    elif experts.shared_width:
        linears += _feed_forward("mlp.shared_expert", hidden, experts.shared_width)
        linears.append(Linear("mlp.shared_expert_gate", 1, hidden))
    return Layer(tuple(linears), experts, width, window)


def _feed_forward(
    path: str, hidden: int, width: int, *, fused: bool = False, bias: bool = False
) -> list[Linear]:
    down = Linear(f"{path}.down_proj", hidden, width, bias)
    if fused:
        return [Linear(f"{path}.gate_up_proj", 2 * width, hidden, bias), down]
    return [
        Linear(f"{path}.gate_proj", width, hidden, bias),
        Linear(f"{path}.up_proj", width, hidden, bias),
        down,
    ]


def _experts(
    config: Mapping[str, Any], numbers: _Numbers, family: Family, index: int
) -> Experts | None:
    if family.experts is None:
        return None
    dense = config.get("mlp_only_layers")
    if (isinstance(dense, list) and index in dense) or (index + 1) % numbers.take(
        "decoder_sparse_step", default=1
    ):
        return None
    # transformers 5 writes another name than the checkpoints of before have.
    names = (family.experts, "num_local_experts", "num_experts")
    name = next((name for name in names if config.get(name)), family.experts)
    count = numbers.take(name, most=_MOST_EXPERTS)
    shared = family.shared_expert
    return Experts(
        count=count,
        per_token=min(count, numbers.take("num_experts_per_tok")),
        width=numbers.take(family.expert_width),
        shared_width=0 if shared is None else numbers.take(shared),
    )


def _windows(
    config: Mapping[str, Any], numbers: _Numbers, family: Family, n_layers: int
) -> list[int | None]:
    """Give each layer's window."""
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return [None] * n_layers
    window = numbers.take("sliding_window")
    types = config.get("layer_types")
    if isinstance(types, list) and len(types) == n_layers:
        return [window if one == "sliding_attention" else None for one in types]
    if family.full_every is None:
        # Qwen's way: the first layers attend to everything.
        first = n_layers
        if config.get("use_sliding_window"):
            first = numbers.take("max_window_layers", default=n_layers)
        return [None if index < first else window for index in range(n_layers)]
    every = numbers.take("sliding_window_pattern", default=family.full_every or n_layers + 1)
    return [None if (index + 1) % every == 0 else window for index in range(n_layers)]


def _rotary_dim(config: Mapping[str, Any], head_dim: int) -> int:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    share = config.get("partial_rotary_factor") or (
        rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None
    )
    return int(head_dim * share) if isinstance(share, int | float) and 0 < share <= 1 else head_dim


def _alone_above(config: Mapping[str, Any]) -> int | None:
    """Give what `qlora_core.train.packing.alone_above` does."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = (
        [one for one in (rope, *rope.values()) if isinstance(one, Mapping)]
        if isinstance(rope, Mapping)
        else []
    )
    limits = [
        one.get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings")
        or config.get("max_position_embeddings")
        for one in kinds
        if (one.get("rope_type") or one.get("type")) in ("dynamic", "longrope")
    ]
    limits.append(config.get("attention_chunk_size"))
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def _switched(config: Mapping[str, Any], switch: Switch) -> bool:
    return bool(config.get(switch)) if isinstance(switch, str) else switch


def _tied(config: Mapping[str, Any], family: Family) -> bool:
    tied = config.get("tie_word_embeddings")
    return family.tied if tied is None else bool(tied)
