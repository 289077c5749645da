"""Speculative decoding of somebody's model: four functions stand between it and the engine.

model = subspec_jax.ForeignModel(embed, block, unembed, cache)
target = model.target(top, layers, resident=2)   # all other layers in host memory
draft = model.draft(target, rules, TreeSpec("beam", depth=6, width=4))
tokens = subspec_jax.Decoder(target, draft, max_length=512).generate(prompt, 64)
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from llm_jax.attention import Step, empty_cache
from llm_jax.cache import KV, move_rows
from llm_jax.config import DTYPES, Config
from llm_jax.linear import embedding_rows, linear
from llm_jax.model import block
from llm_jax.params import Params
from llm_jax.stream import to_device
from subspec_jax import SubspecError
from subspec_jax.foreign.substitutes import Rule, substitute
from subspec_jax.offload import place
from subspec_jax.program import static
from subspec_jax.propose import ModelDraft
from subspec_jax.tree import TreeSpec
from subspec_jax.verify import Target


@dataclasses.dataclass(frozen=True)
class ForeignModel:
    """What the engine asks of a model. All four are traced by JAX, and neither keep nor change
    anything outside; `top` and a `layer` are any pytrees (an NNX module is one).

    Letters: B batch (1 here), T new tokens, S cache slots, D model, V vocabulary.
    """

    embed: Callable[[Any, jax.Array], jax.Array]
    """f(top, tokens_BT int32) -> x_BTD."""
    block: Callable[[Any, jax.Array, Any, Step], tuple[jax.Array, Any]]
    """f(layer, x_BTD, cache, step) -> (x_BTD, the cache with the new keys and values in slots
    step.at … step.at + T - 1).

    Positions are step.position_BT [1, T], which need not be the slots: the nodes of a draft tree
    stand side by side. Query t attends to slot s where step.mask_BTS [1, T, S] is true, and nowhere
    else; slots beyond may hold anything.
    """
    unembed: Callable[[Any, jax.Array], jax.Array]
    """f(top, x_BTD) -> logits_BTV, the last norm included."""
    cache: Callable[[Any, int, int], Any]
    """f(layer, B, S) -> an empty cache of the layer: a pytree of arrays [B, S, …], or a cache of
    this project's kinds, such as `llm_jax.attention.empty_cache` gives."""

    def target(
        self, top: Any, layers: Sequence[Any], resident: int | Collection[int] = 0, ahead: int = 1
    ) -> Target:
        """The exact model for `subspec_jax.Decoder`.

        `top` holds what `embed` and `unembed` need, and stays on the device with the `resident`
        layers (a number of first ones, or their numbers). Arrays of two and more axes of all other
        layers move to pinned host memory, and `ahead` + 1 of these layers are on the device at any
        time. Raises SubspecError for functions that do not fit together.
        """
        if not layers:
            raise SubspecError("a model without layers cannot be decoded")
        cfg = self._config(top, layers)
        own = [ForeignLayer.of(layer, self) for layer in layers]
        outside = ForeignTop(to_device(top), self)
        return Target(Params(outside, place(own, resident), None, outside), cfg, ahead)

    def draft(
        self, target: Target, rules: Sequence[Rule], spec: TreeSpec, **options: Any
    ) -> ModelDraft:
        """A draft of low-bit substitutes that shares the target's cache, embedding and head.

        Paths are those of {"layers": layers}, such as "layers/0/mlp/up/kernel". `options` are those
        of `subspec_jax.ModelDraft`. Raises RuleError for a rule that matches nothing.
        """
        own = [layer.own for layer in target.params.layers]
        low = substitute({"layers": own}, rules)["layers"]
        layers = tuple(ForeignLayer.of(to_device(layer), self) for layer in low)
        params = dataclasses.replace(target.params, layers=layers)
        return ModelDraft(params, target.cfg, spec, **options)

    def _config(self, top: Any, layers: Sequence[Any]) -> Config:
        """What the engine has to know of the model, from the shapes that its functions give."""
        T, S = 2, 64
        tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
        x = jax.eval_shape(self.embed, top, tokens)
        if x.ndim != 3 or x.shape[:2] != (1, T) or str(x.dtype) not in DTYPES:
            raise SubspecError(
                f"embed gives {x.dtype} {x.shape} for tokens (1, {T}); expected (1, {T}, D) in one "
                f"of {', '.join(DTYPES)}"
            )
        logits = jax.eval_shape(self.unembed, top, x)
        if logits.ndim != 3 or logits.shape[:2] != (1, T):
            raise SubspecError(f"unembed gives {logits.shape}; expected (1, {T}, V)")
        step = jax.eval_shape(lambda: _step(T, S))
        for i, layer in enumerate(layers):
            cache = jax.eval_shape(functools.partial(self.cache, layer, 1, S))
            leaves = jax.tree.leaves(cache)
            wrong = [a.shape for a in leaves if not _moves_itself(cache) and a.shape[:2] != (1, S)]
            if wrong or not leaves:
                raise SubspecError(
                    f"cache of layer {i} has arrays of {wrong or 'no'} shape; expected (1, {S}, …)"
                )
            after = jax.eval_shape(self.block, layer, x, cache, step)
            found, given = _shapes(after), _shapes((x, cache))
            if found != given:
                raise SubspecError(
                    f"block of layer {i} gives {found} for {given}; expected the same shapes and "
                    "dtypes"
                )
        return Config(
            layers=len(layers), d_model=x.shape[2], vocab=logits.shape[2], dtype=str(x.dtype),
            heads=1, kv_heads=1, head_dim=2, d_ff=1, family="foreign",
        )  # fmt: skip


def _moves_itself(cache: Any) -> bool:
    """Whether it is a cache of another kind than plain buffers, such as one of latents."""
    return hasattr(cache, "move") and not isinstance(cache, KV)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)


def _step(length: int, slots: int) -> Step:
    position_T = jnp.arange(length, dtype=jnp.int32)
    mask_1TS = jnp.arange(slots)[None, None] <= position_T[None, :, None]
    return Step(jnp.int32(0), position_T[None], mask_1TS)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class ForeignLayer:
    """A layer of such a model, taken apart: some modules hold nothing but arrays in their place."""

    leaves: tuple
    structure: Any = static()
    model: ForeignModel = static()
    mlp = None
    """It has no experts that could be streamed one by one."""

    @classmethod
    def of(cls, layer: Any, model: ForeignModel) -> "ForeignLayer":
        leaves, structure = jax.tree.flatten(layer)
        return cls(tuple(leaves), structure, model)

    @property
    def own(self) -> Any:
        """The layer as its model knows it."""
        return jax.tree.unflatten(self.structure, self.leaves)

    @property
    def attn(self) -> "ForeignLayer":
        """What `empty_cache` asks for the kind of cache."""
        return self


@register_dataclass
@dataclasses.dataclass(frozen=True)
class ForeignTop:
    """What such a model has outside its layers: its embedding and its head."""

    own: Any
    model: ForeignModel = static()


@register_dataclass
@dataclasses.dataclass(frozen=True)
class ForeignCache:
    """A layer's cache: arrays [B, S, …]."""

    own: Any

    @property
    def slots(self) -> int:
        return jax.tree.leaves(self.own)[0].shape[1]

    @property
    def rewinds(self) -> bool:
        """Whether the first slots are the same, whatever was written behind them."""
        return True

    def move(self, source: jax.Array, at: jax.Array) -> "ForeignCache":
        return jax.tree.map(lambda buffer: move_rows(buffer, source, at), self)


@embedding_rows.register
def _(table: ForeignTop, tokens):
    return table.model.embed(table.own, tokens)


@linear.register
def _(w: ForeignTop, x, out_dtype=None):
    return w.model.unembed(w.own, x).astype(out_dtype or x.dtype)


@block.register
def _(layer: ForeignLayer, x_BTD, cache, step: Step, cfg: Config):
    if not isinstance(cache, ForeignCache):
        return layer.model.block(layer.own, x_BTD, cache, step)
    x_BTD, own = layer.model.block(layer.own, x_BTD, cache.own, step)
    return x_BTD, ForeignCache(own)


@empty_cache.register
def _(p: ForeignLayer, cfg: Config, batch: int, slots: int, scratch: int = 0):
    cache = p.model.cache(p.own, batch, slots)
    return cache if _moves_itself(cache) else ForeignCache(cache)
