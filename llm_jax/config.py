"""What a decoder-only model looks like: sizes and variants, filled by its family."""

import dataclasses
from typing import Any

from llm_jax.rope import LONGEST, THETA, RopeScaling, scaling_from_dict
from llm_jax.values import ConfigError, Values

AXIS = "cards"
"""The axis of the mesh of cards, in programs that several share."""
MOST_CARDS = 1024
SIZES = {
    # field of Config -> the largest value; far above any model, far below what fills a memory
    "layers": 10_000,
    "d_model": 2**20,
    "heads": 2**14,
    "kv_heads": 2**14,
    "head_dim": 2**14,
    "d_ff": 2**22,
    "vocab": 2**24,
    "max_length": LONGEST,
}
EPS = (1e-15, 0.1)
"""Lowest and highest epsilon of the norms."""
SCALE = (1e-6, 1e6)
"""Smallest and largest constant factor of embeddings, queries, branches and logits."""
DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Supported dtypes and their bytes per element."""

FULL, SLIDING, UNROTATED = "full", "sliding", "unrotated"
"""Kinds of attention: over all tokens; over the last `window` tokens; over all, without rope."""
ACTIVATIONS = ("silu", "gelu_tanh")
NORMS = ("before", "around", "after")


@dataclasses.dataclass(frozen=True)
class Experts:
    """The mixture of experts that layers have in place of an MLP."""

    count: int
    """Experts of a layer."""
    chosen: int
    """Experts that a token is routed to."""
    d_ff: int
    """Width of an expert."""
    normalize: bool = True
    """The weights of the chosen experts sum to one."""
    shared_d_ff: int = 0
    """Width of the expert that all tokens use, beside the chosen ones; 0: there is none."""
    shared_gate: bool = False
    """The shared expert's output is multiplied by a sigmoid of the token (Qwen2-MoE)."""
    biases: bool = False
    """Router and experts have biases (gpt-oss)."""
    clamp: float | None = None
    """gpt-oss: gate and up are clamped to this, and the product is (up + 1) gate sigmoid(1.702
    gate)."""
    dense_layers: tuple[int, ...] = ()
    """Layers that have an MLP all the same."""

    def __post_init__(self):
        values = Values(vars(self), "experts: ")
        count = values.integer("count", 1, 2**14)
        values.integer("chosen", 1, count)
        values.integer("d_ff", 1, SIZES["d_ff"])
        values.integer("shared_d_ff", 0, SIZES["d_ff"])
        values.number("clamp", *SCALE, None)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and variants of one model. Hashable, so it can be a static argument of `jax.jit`."""

    layers: int
    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    d_ff: int
    vocab: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    """Biases on the q, k and v projections (Qwen2 and Qwen2.5)."""
    qk_norm: bool = False
    """RMS norms over each head of q and k, before the rotation (Qwen3)."""
    tied: bool = False
    """The output head is the embedding table."""
    max_length: int = 2048
    """Positions that the model was trained for."""
    dtype: str = "bfloat16"
    family: str = "llama"
    layer_kinds: tuple[str, ...] = ()
    """The kind of each layer's attention: FULL, SLIDING or UNROTATED; empty: all are FULL."""
    window: int | None = None
    """Tokens that a SLIDING layer looks at, the newest included."""
    sliding_theta: float | None = None
    """The base of SLIDING layers' frequencies, which are not scaled (Gemma 3); None: as FULL."""
    rotary_dim: int | None = None
    """Leading dimensions of a head that rotate (Phi-4-mini); None: all."""
    o_bias: bool = False
    """A bias on the output projection of the attention."""
    mlp_bias: bool = False
    """Biases on the three matrices of the MLP."""
    qk_norm_whole: bool = False
    """The norms of q and k are over all heads together (OLMo 2)."""
    norms: str = "before"
    """Where a branch has its norm: "before" it, "after" it (OLMo 2), or "around" it (Gemma 2)."""
    wide_gains: bool = False
    """Norms multiply by their gains in float32, before they round (Gemma, OLMo 2, gpt-oss)."""
    activation: str = "silu"
    """Of the MLP's gate."""
    embed_scale: float = 1.0
    """What embeddings are multiplied by, rounded to the dtype."""
    residual_scale: float = 1.0
    """What the output of a branch is multiplied by (Granite)."""
    logit_scale: float = 1.0
    """What logits are multiplied by (Granite)."""
    query_scale: float | None = None
    """What scores are multiplied by; None: 1 / sqrt(head_dim)."""
    attn_softcap: float | None = None
    """Scores become cap tanh(score / cap) (Gemma 2)."""
    logit_softcap: float | None = None
    """The same for logits."""
    sinks: bool = False
    """Each query head has a learned logit that takes part in its softmax and has no value."""
    experts: Experts | None = None
    """None: all layers have an MLP."""
    cards: int = 1
    """Cards that share every layer (`llm_jax.cards`). `heads`, `kv_heads` and `d_ff` are then of
    one card, and its output head has `head_columns`."""

    def __post_init__(self):
        values = Values(vars(self))
        for name, largest in SIZES.items():
            values.integer(name, 1, largest)
        values.number("rope_theta", *THETA)
        values.number("sliding_theta", *THETA, None)
        values.number("norm_eps", *EPS)
        for name in ("embed_scale", "residual_scale", "logit_scale"):
            values.number(name, *SCALE)
        for name in ("query_scale", "attn_softcap", "logit_softcap"):
            values.number(name, *SCALE, None)
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"{self.heads} query heads cannot share {self.kv_heads} kv heads evenly; "
                "heads must be a multiple of kv_heads"
            )
        for name in ("head_dim", "rotary_dim"):
            if (getattr(self, name) or 0) % 2:
                found = getattr(self, name)
                raise ConfigError(f"{name} is {found}; rotary positions need an even one")
        values.integer("rotary_dim", 2, self.head_dim, None)
        values.integer("cards", 1, MOST_CARDS)
        values.integer("window", 1, LONGEST, None)
        choices = dict(dtype=DTYPES, activation=ACTIVATIONS, norms=NORMS)
        for name, known in choices.items():
            if values.text(name) not in known:
                values.refuse(name, f"one of {', '.join(known)}")
        if self.layer_kinds and len(self.layer_kinds) != self.layers:
            raise ConfigError(f"{len(self.layer_kinds)} kinds of {self.layers} layers are named")
        if unknown := set(self.layer_kinds) - {FULL, SLIDING, UNROTATED}:
            raise ConfigError(f"{min(unknown)!r} is no kind of attention")
        if SLIDING in self.layer_kinds and self.window is None:
            raise ConfigError("layers have sliding attention, and the window has no size")

    def kind(self, layer: int) -> str:
        """The kind of a layer's attention."""
        return self.layer_kinds[layer] if self.layer_kinds else FULL

    @property
    def head_columns(self) -> int:
        """Columns of the output head that a card has."""
        return -(-self.vocab // self.cards)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts in place of an MLP."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @property
    def gain_dtype(self) -> str:
        """The dtype of the norms' gains."""
        return "float32" if self.wide_gains else self.dtype

    @property
    def layer_matrices(self) -> dict[str, tuple[int, int]]:
        """Shape [in, out] of the seven matrices of a layer with an MLP, in the order of use."""
        d, f = self.d_model, self.d_ff
        return self.attention_matrices | dict(gate=(d, f), up=(d, f), down=(f, d))

    @property
    def attention_matrices(self) -> dict[str, tuple[int, int]]:
        """Shape [in, out] of the four matrices of a layer's attention."""
        d, n, k = self.d_model, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return dict(q=(d, n), k=(d, k), v=(d, k), o=(n, d))

    @property
    def joined_matrices(self) -> dict[str, tuple[int, int]]:
        """Shape [in, out] of the four matrices of a joined layer (`llm_jax.params.joined`)."""
        m = self.layer_matrices
        side = lambda *names: (m[names[0]][0], sum(m[n][1] for n in names))
        return dict(qkv=side(*"qkv"), o=m["o"], gate_up=side("gate", "up"), down=m["down"])

    def layer_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter of a layer, by name; matrices are [in, out]."""
        d, heads, kv_heads, h = self.d_model, self.heads, self.kv_heads, self.head_dim
        shapes: dict[str, tuple[int, ...]] = {}
        before = ("attn_norm", "mlp_norm") if self.norms != "after" else ()
        after = ("attn_out_norm", "mlp_out_norm") if self.norms != "before" else ()
        shapes |= dict.fromkeys((*before, *after), (d,))
        shapes |= self.attention_matrices
        if self.qkv_bias:
            shapes |= dict(q_bias=(heads * h,), k_bias=(kv_heads * h,), v_bias=(kv_heads * h,))
        if self.o_bias:
            shapes |= dict(o_bias=(d,))
        if self.qk_norm:
            whole = self.qk_norm_whole
            shapes |= dict(
                q_norm=(heads * h if whole else h,), k_norm=(kv_heads * h if whole else h,)
            )
        if self.sinks:
            shapes |= dict(sinks=(heads,))
        if not self.has_experts(layer):
            names = ("gate", "up", "down")
            shapes |= {name: self.layer_matrices[name] for name in names}
            if self.mlp_bias:
                shapes |= {f"{name}_bias": self.layer_matrices[name][1:] for name in names}
            return shapes
        e = self.experts
        shapes |= dict(router=(d, e.count))
        shapes |= dict(expert_gate_up=(e.count, d, 2 * e.d_ff), expert_down=(e.count, e.d_ff, d))
        if e.biases:
            shapes |= dict(router_bias=(e.count,), expert_gate_up_bias=(e.count, 2 * e.d_ff))
            shapes |= dict(expert_down_bias=(e.count, d))
        if f := e.shared_d_ff:
            shapes |= dict(shared_gate=(d, f), shared_up=(d, f), shared_down=(f, d))
        if e.shared_gate:
            shapes |= dict(shared_scale=(d, 1))
        return shapes

    @property
    def layer_matrix_elements(self) -> int:
        """Numbers in the seven matrices of one layer with an MLP."""
        return sum(rows * columns for rows, columns in self.layer_matrices.values())

    @property
    def layer_vector_elements(self) -> int:
        """Numbers of the first layer that are not in a matrix: norms and biases."""
        return sum(shape[0] for shape in self.layer_shapes(0).values() if len(shape) == 1)

    @property
    def parameter_count(self) -> int:
        """All parameters; a tied head is counted once."""
        tables = self.vocab * self.d_model * (1 if self.tied else 2)
        layers = sum(
            _product(shape)
            for layer in range(self.layers)
            for shape in self.layer_shapes(layer).values()
        )
        return layers + tables + self.d_model

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Config":
        """The `Config` whose fields were written by `dataclasses.asdict`, perhaps as JSON."""
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        values["rope_scaling"] = scaling_from_dict(values.get("rope_scaling"))
        if (experts := values.get("experts")) is not None:
            dense = tuple(experts["dense_layers"])
            values["experts"] = Experts(**experts | {"dense_layers": dense})
        return cls(**values)


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
