"""Parameters as frozen dataclasses that are pytrees. Layers are in a tuple, so kinds can be mixed.

Letters: V vocabulary, D model, N query heads x head size, K kv heads x head size, F ffn, E experts.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from llm_jax.config import FULL, Config
from llm_jax.mxfp4 import GROUP, Mxfp4

Weight = Any
"""A matrix [in, out]: a `jax.Array`, or any type registered with `llm_jax.linear.linear`."""


def _kind():
    """The kind of attention: `Config` says what it means."""
    return dataclasses.field(default=FULL, metadata=dict(static=True))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Attention:
    """Grouped-query attention: four matrices, optional biases, norms of q and k, and sinks."""

    q: Weight
    k: Weight
    v: Weight
    o: Weight
    q_bias: jax.Array | None = None
    k_bias: jax.Array | None = None
    v_bias: jax.Array | None = None
    q_norm: jax.Array | None = None
    k_norm: jax.Array | None = None
    o_bias: jax.Array | None = None
    sinks: jax.Array | None = None
    kind: str = _kind()


@register_dataclass
@dataclasses.dataclass(frozen=True)
class MLP:
    """Gated MLP: down(act(gate(x)) * up(x))."""

    gate: Weight
    up: Weight
    down: Weight
    gate_bias: jax.Array | None = None
    up_bias: jax.Array | None = None
    down_bias: jax.Array | None = None


@register_dataclass
@dataclasses.dataclass(frozen=True)
class JoinedAttention:
    """`Attention` whose q, k and v are one matrix: one product in place of three."""

    qkv: Weight
    o: Weight
    qkv_bias: jax.Array | None = None
    q_norm: jax.Array | None = None
    k_norm: jax.Array | None = None
    o_bias: jax.Array | None = None
    sinks: jax.Array | None = None
    kind: str = _kind()


@register_dataclass
@dataclasses.dataclass(frozen=True)
class JoinedMLP:
    """`MLP` whose gate and up are one matrix."""

    gate_up: Weight
    down: Weight
    gate_up_bias: jax.Array | None = None
    down_bias: jax.Array | None = None


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Experts:
    """Many MLPs, of which a router chooses some for each token; all experts of a layer in a stack.

    A stack is an array, or a kind of weight whose arrays have one more axis in front: the experts.
    """

    router: jax.Array
    """[D, E], in the model's dtype; never quantized, so that a draft routes like its target."""
    expert_gate_up: Weight
    """A stack of [D, 2F]: the columns of gate, then those of up."""
    expert_down: Weight
    """A stack of [F, D]."""
    router_bias: jax.Array | None = None
    expert_gate_up_bias: jax.Array | None = None
    expert_down_bias: jax.Array | None = None
    shared: MLP | JoinedMLP | None = None
    """The expert that all tokens use."""
    shared_scale: jax.Array | None = None
    """[D, 1]: a sigmoid of this product multiplies the shared expert's output."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class SeparateExperts:
    """A layer's experts in arrays of their own, so that each can be moved alone. In `Experts` it
    takes the place of both stacks: it stands for `expert_gate_up`, and `expert_down` is None.

    An expert is one flat array, gate_up before down: an allocator keeps arrays of one size without
    holes between them.
    """

    each: tuple[jax.Array, ...]
    shapes: tuple[tuple[int, int], tuple[int, int]] = dataclasses.field(metadata=dict(static=True))
    mxfp4: bool = dataclasses.field(default=False, metadata=dict(static=True))
    """The arrays are uint8: of each matrix the codes, then the scales of `llm_jax.mxfp4`."""

    def matrices(self, flat: jax.Array, number: Any = None) -> tuple[Weight, Weight]:
        """(gate_up [D, 2F], down [F, D]) of one of the arrays, whatever the expert's number."""
        found, at = [], 0
        for D, F in self.shapes:
            parts = [(D // 2, F), (D // GROUP, F)] if self.mxfp4 else [(D, F)]
            for shape in parts:
                size = shape[0] * shape[1]
                found.append(flat[at : at + size].reshape(shape))
                at += size
        if self.mxfp4:
            return Mxfp4(*found[:2]), Mxfp4(*found[2:])
        return found[0], found[1]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """One decoder layer. A norm that is None is not there."""

    attn_norm: jax.Array | None
    attn: Any
    mlp_norm: jax.Array | None
    mlp: Any
    attn_out_norm: jax.Array | None = None
    mlp_out_norm: jax.Array | None = None

    def of_kind(self, kind: str) -> "Layer":
        """The same parameters with another kind of attention."""
        return dataclasses.replace(self, attn=dataclasses.replace(self.attn, kind=kind))


def joined(layer: Layer, join: Callable[..., Weight]) -> Layer:
    """A plain layer with four matrices: `join(q, k, v)`, `join(o)`, `join(gate, up)`, `join(down)`.

    `join` puts matrices side by side along their outputs. The stacks of experts, joined already,
    are given to it alone.
    """
    a, m = layer.attn, layer.mlp
    attn = JoinedAttention(
        join(a.q, a.k, a.v), join(a.o), _side_by_side(a.q_bias, a.k_bias, a.v_bias),
        a.q_norm, a.k_norm, a.o_bias, a.sinks, a.kind,
    )  # fmt: skip
    return dataclasses.replace(layer, attn=attn, mlp=joined_mlp(m, join))


def joined_mlp(m: MLP | Experts, join: Callable[..., Weight]) -> JoinedMLP | Experts:
    """The part of `joined` behind the attention."""
    if isinstance(m, Experts):
        return dataclasses.replace(
            m,
            expert_gate_up=join(m.expert_gate_up),
            expert_down=join(m.expert_down),
            shared=None if m.shared is None else joined_mlp(m.shared, join),
        )
    bias = _side_by_side(m.gate_bias, m.up_bias)
    return JoinedMLP(join(m.gate, m.up), join(m.down), bias, m.down_bias)


def _side_by_side(*vectors: jax.Array | None) -> jax.Array | None:
    return None if vectors[0] is None else jnp.concatenate(vectors)


def unjoined(layer: Layer, cfg: Config) -> Layer:
    """The plain layer that `joined` was given; all matrices are arrays."""
    a, heads = layer.attn, cfg.heads * cfg.head_dim
    cut = (heads, heads + cfg.kv_heads * cfg.head_dim)
    q, k, v = jnp.split(a.qkv, cut, axis=-1)
    biases = (None,) * 3 if a.qkv_bias is None else jnp.split(a.qkv_bias, cut)
    attn = Attention(q, k, v, a.o, *biases, a.q_norm, a.k_norm, a.o_bias, a.sinks, a.kind)
    return dataclasses.replace(layer, attn=attn, mlp=_unjoined_mlp(layer.mlp))


def _unjoined_mlp(m: JoinedMLP | Experts) -> MLP | Experts:
    if isinstance(m, Experts):
        shared = None if m.shared is None else _unjoined_mlp(m.shared)
        return dataclasses.replace(m, shared=shared)
    biases = (None, None) if m.gate_up_bias is None else jnp.split(m.gate_up_bias, 2)
    return MLP(*jnp.split(m.gate_up, 2, axis=-1), m.down, *biases, m.down_bias)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Params:
    """A whole model. `head_DV` is None where the head is tied to the embedding, and `norm` where
    the head norms its input itself."""

    embed_VD: Any
    layers: tuple[Layer, ...]
    norm: jax.Array | None
    head_DV: Weight | None = None


def filled(cls: type, named: Mapping[str, Any], /, **more: Any) -> Any:
    """The dataclass with its fields from `named`, as far as they are there, and from `more`."""
    return cls(**{f.name: named[f.name] for f in dataclasses.fields(cls) if f.name in named} | more)


def layer_from(named: Mapping[str, Any], index: int, cfg: Config) -> Layer:
    """Layer `index` from its parameters by name (`Config.layer_shapes`)."""
    if cfg.has_experts(index):
        shared = None
        if "shared_up" in named:
            shared = MLP(*(named[f"shared_{part}"] for part in ("gate", "up", "down")))
        mlp = filled(Experts, named, shared=shared)
    else:
        mlp = filled(MLP, named)
    norms = {name: named.get(name) for name in NORMS}
    return Layer(attn=filled(Attention, named, kind=cfg.kind(index)), mlp=mlp, **norms)


NORMS = ("attn_norm", "mlp_norm", "attn_out_norm", "mlp_out_norm")
"""The norms of a layer, which are gains of [D]."""
GAINS = (*NORMS, "q_norm", "k_norm", "norm")
"""All norms' gains."""


def named_parameters(layer: Layer) -> dict[str, Any]:
    """What `layer_from` was given."""
    found = {name: getattr(layer, name) for name in NORMS}
    found |= {k: v for k, v in vars(layer.attn).items() if k != "kind"}
    found |= {k: v for k, v in vars(layer.mlp).items() if k != "shared"}
    if (shared := getattr(layer.mlp, "shared", None)) is not None:
        found |= {f"shared_{k}": v for k, v in vars(shared).items()}
    return {name: value for name, value in found.items() if value is not None}


def init_layer(key: jax.Array, cfg: Config, index: int = 0) -> Layer:
    """A random layer in the model's dtype, scaled so that activations keep their size."""
    shapes = cfg.layer_shapes(index)
    matrices = [name for name, shape in shapes.items() if _is_matrix(name, shape)]
    keys = dict(zip(matrices, jax.random.split(key, len(matrices)), strict=True))

    def draw(name, shape):
        if name in keys:
            scale = jnp.asarray(shape[-2] ** -0.5, cfg.dtype)
            return jax.random.normal(keys[name], shape, cfg.dtype) * scale
        if name in GAINS:
            return jnp.ones(shape, cfg.gain_dtype)
        return jnp.zeros(shape, cfg.dtype)

    return layer_from({name: draw(name, shape) for name, shape in shapes.items()}, index, cfg)


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and not name.endswith("_bias")


def init(key: jax.Array, cfg: Config) -> Params:
    """Random parameters on the default device, for tests and timings without a checkpoint."""
    table, head, *layers = jax.random.split(key, cfg.layers + 2)
    scale = jnp.asarray(cfg.d_model**-0.5, cfg.dtype)
    return Params(
        jax.random.normal(table, (cfg.vocab, cfg.d_model), cfg.dtype),
        tuple(init_layer(k, cfg, i) for i, k in enumerate(layers)),
        jnp.ones(cfg.d_model, cfg.gain_dtype),
        None
        if cfg.tied
        else jax.random.normal(head, (cfg.d_model, cfg.head_columns), cfg.dtype) * scale,
    )


def abstract(cfg: Config) -> Params:
    """The model's tree with shapes and dtypes in place of arrays: what a checkpoint must fill."""
    return jax.eval_shape(lambda: init(jax.random.key(0), cfg))
