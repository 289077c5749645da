"""What one family of models is: how its config.json reads, and how its tensors are called."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from llm_jax.config import FULL, SIZES, SLIDING
from llm_jax.values import ConfigError, Values, short

HF_NAMES: dict[str, str] = dict(
    embed_VD="model.embed_tokens.weight",
    norm="model.norm.weight",
    head_DV="lm_head.weight",
    attn_norm="model.layers.{}.input_layernorm.weight",
    mlp_norm="model.layers.{}.post_attention_layernorm.weight",
    gate="model.layers.{}.mlp.gate_proj.weight",
    up="model.layers.{}.mlp.up_proj.weight",
    down="model.layers.{}.mlp.down_proj.weight",
    gate_bias="model.layers.{}.mlp.gate_proj.bias",
    up_bias="model.layers.{}.mlp.up_proj.bias",
    down_bias="model.layers.{}.mlp.down_proj.bias",
    **{name: f"model.layers.{{}}.self_attn.{name}_proj.weight" for name in "qkvo"},
    **{f"{name}_bias": f"model.layers.{{}}.self_attn.{name}_proj.bias" for name in "qkvo"},
    **{f"{name}_norm": f"model.layers.{{}}.self_attn.{name}_norm.weight" for name in "qk"},
    router="model.layers.{}.mlp.gate.weight",
    expert_gate="model.layers.{}.mlp.experts.{}.gate_proj.weight",
    expert_up="model.layers.{}.mlp.experts.{}.up_proj.weight",
    expert_down="model.layers.{}.mlp.experts.{}.down_proj.weight",
    shared_gate="model.layers.{}.mlp.shared_expert.gate_proj.weight",
    shared_up="model.layers.{}.mlp.shared_expert.up_proj.weight",
    shared_down="model.layers.{}.mlp.shared_expert.down_proj.weight",
    shared_scale="model.layers.{}.mlp.shared_expert_gate.weight",
)
"""Parameter -> its tensor in a Hugging Face checkpoint, as most families call it. The first {} is
the layer, the second the expert."""

GGUF_NAMES: dict[str, str] = dict(
    embed_VD="token_embd.weight",
    norm="output_norm.weight",
    head_DV="output.weight",
    attn_norm="blk.{}.attn_norm.weight",
    mlp_norm="blk.{}.ffn_norm.weight",
    attn_out_norm="blk.{}.post_attention_norm.weight",
    mlp_out_norm="blk.{}.post_ffw_norm.weight",
    o="blk.{}.attn_output.weight",
    o_bias="blk.{}.attn_output.bias",
    **{name: f"blk.{{}}.attn_{name}.weight" for name in "qkv"},
    **{f"{name}_bias": f"blk.{{}}.attn_{name}.bias" for name in "qkv"},
    **{f"{name}_norm": f"blk.{{}}.attn_{name}_norm.weight" for name in "qk"},
    **{name: f"blk.{{}}.ffn_{name}.weight" for name in ("gate", "up", "down")},
    sinks="blk.{}.attn_sinks.weight",
    router="blk.{}.ffn_gate_inp.weight",
    router_bias="blk.{}.ffn_gate_inp.bias",
    expert_gate="blk.{}.ffn_gate_exps.weight",
    expert_up="blk.{}.ffn_up_exps.weight",
    expert_down="blk.{}.ffn_down_exps.weight",
    expert_gate_bias="blk.{}.ffn_gate_exps.bias",
    expert_up_bias="blk.{}.ffn_up_exps.bias",
    expert_down_bias="blk.{}.ffn_down_exps.bias",
    shared_gate="blk.{}.ffn_gate_shexp.weight",
    shared_up="blk.{}.ffn_up_shexp.weight",
    shared_down="blk.{}.ffn_down_shexp.weight",
    shared_scale="blk.{}.ffn_gate_inp_shexp.weight",
)
"""The same for GGUF; the tensors of experts hold all experts of a layer."""


def nothing_more(values: Values) -> dict[str, Any]:
    """No fields of `Config` beyond those that all families have."""
    return {}


@dataclasses.dataclass(frozen=True)
class Family:
    """A family, by its `model_type` in config.json."""

    model_type: str
    fields: Callable[[Values], dict[str, Any]] = nothing_more
    """From config.json: the fields of `Config` that are not the same in every family. They replace
    what `llm_jax.hf_config.from_hf` reads."""
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Tensors that are called otherwise than in HF_NAMES."""
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Tensor -> the parameters that are its rows, one below the other."""
    stacked_experts: bool = False
    """Tensors hold all experts of a layer, [expert, in, out], the columns of gate and up taking
    turns (gpt-oss)."""
    gain_offset: float = 0.0
    """What is added to the norms' gains of a safetensors file. GGUF files have it added."""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What transformers takes for values that config.json leaves out, where not as usual."""
    rope_theta: float = 10_000.0
    """The base of the rotary frequencies where config.json names none."""
    gguf: str | None = None
    """Its general.architecture in GGUF files; None: as `model_type`."""
    gguf_fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """`fused` of GGUF files."""
    gguf_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Tensors of GGUF files that are called otherwise than in GGUF_NAMES."""
    paired_rows: bool = False
    """GGUF files store the rows of q and k so that rotated pairs are neighbours."""

    @property
    def hf_names(self) -> dict[str, str]:
        """Parameter -> its tensor in a Hugging Face checkpoint."""
        return HF_NAMES | dict(self.names)

    @property
    def architecture(self) -> str:
        """Its general.architecture in GGUF files."""
        return self.gguf or self.model_type


def windows(values: Values, when_absent: str = FULL) -> dict[str, Any]:
    """`layer_kinds` and `window` from `layer_types` and `sliding_window`.

    `when_absent` is the kind of all layers where `layer_types` is not there. A window that is at
    least as long as all texts is none.
    """
    layers = values.integer("num_hidden_layers", 1, SIZES["layers"])
    longest = values.integer("max_position_embeddings", 1, SIZES["max_length"], 2048)
    kinds = {"full_attention": FULL, "sliding_attention": SLIDING}
    named = values.list_of(str, "layer_types")
    if unknown := set(named) - set(kinds):
        raise ConfigError(f"layer_types has {short(min(unknown))}; only attention is supported")
    if named and len(named) != layers:
        values.refuse("layer_types", f"{layers} entries, one a layer")
    found = tuple(kinds[name] for name in named) or (when_absent,) * layers
    window = values.integer("sliding_window", 0, SIZES["max_length"], None)
    if SLIDING not in found or not window or window >= longest:
        return {}
    return dict(layer_kinds=found, window=window)


def sparse_layers(values: Values, layers: int) -> tuple[int, ...]:
    """The layers with an MLP in place of experts: `mlp_only_layers` and `decoder_sparse_step`."""
    step = values.integer("decoder_sparse_step", 1, SIZES["layers"], 1)
    dense = set(values.list_of(int, "mlp_only_layers"))
    return tuple(i for i in range(layers) if i in dense or (i + 1) % step)
