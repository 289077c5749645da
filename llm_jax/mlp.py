"""The part of a layer behind the attention: an open function dispatched on its parameters' type.

Letters: M tokens in a row, E experts, P pairs of a token and an expert that it is routed to.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.cards import summed
from llm_jax.config import Config
from llm_jax.linear import linear
from llm_jax.params import MLP, Experts, JoinedMLP
from pallas_kernels.precision import precision

FEW_PAIRS = 64
"""Most pairs of token and expert for which each pair's expert is taken out of the stack; for more,
every expert is applied to all tokens, one after another."""


@functools.singledispatch
def mlp(p: Any, x_BTD: jax.Array, cfg: Config) -> jax.Array:
    """What a layer adds to x behind its attention, [B, T, D]."""
    raise TypeError(
        f"no MLP is registered for parameters of type {type(p).__name__}; "
        "register one with @llm_jax.mlp.mlp.register"
    )


def plus(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """y and a bias along its last axis, if there is one."""
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)


def activated(gate: jax.Array, up: jax.Array, cfg: Config) -> jax.Array:
    """act(gate) * up."""
    if cfg.activation == "gelu_tanh":
        return jax.nn.gelu(gate, approximate=True) * up
    return jax.nn.silu(gate) * up


@mlp.register
def _(p: MLP, x_BTD, cfg: Config):
    gate = plus(linear(p.gate, x_BTD), p.gate_bias)
    up = plus(linear(p.up, x_BTD), p.up_bias)
    return plus(summed(linear(p.down, activated(gate, up, cfg)), cfg), p.down_bias)


@mlp.register
def _(p: JoinedMLP, x_BTD, cfg: Config):
    gate, up = jnp.split(plus(linear(p.gate_up, x_BTD), p.gate_up_bias), 2, axis=-1)
    return plus(summed(linear(p.down, activated(gate, up, cfg)), cfg), p.down_bias)


def routing(p: Experts, x_MD: jax.Array, cfg: Config) -> tuple[jax.Array, jax.Array]:
    """(experts int32 [M, chosen], ascending; their weights, float32 [M, chosen]).

    Equal scores go to the expert of the lower number.
    """
    with jax.named_scope("router"):
        logits_ME = jnp.matmul(
            x_MD, p.router, precision=precision(x_MD.dtype), preferred_element_type=jnp.float32
        )
        if p.router_bias is not None:
            logits_ME = logits_ME + p.router_bias.astype(jnp.float32)[None]
        weight_ME = jax.nn.softmax(logits_ME, axis=-1)
        weight, expert = jax.lax.top_k(weight_ME, cfg.experts.chosen)
        if cfg.experts.normalize:
            weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
        # Sorted by number. A few comparisons, because a GPU takes longer to start a real sort.
        rank_Mc = jnp.sum(expert[:, :, None] > expert[:, None, :], axis=-1)
        place_Mcc = rank_Mc[:, :, None] == jnp.arange(expert.shape[1])[None, None]
        expert, weight = (
            jnp.sum(jnp.where(place_Mcc, a[:, :, None], jnp.zeros((), a.dtype)), axis=1)
            for a in (expert, weight)
        )
    if (routed := _ROUTED.get()) is not None:
        routed.append(expert)
    return expert, weight


_ROUTED: contextvars.ContextVar[list | None] = contextvars.ContextVar("routed", default=None)


@contextlib.contextmanager
def recorded_routing() -> Iterator[list[jax.Array]]:
    """A list that gets the experts of every layer that is traced inside, int32 [M, chosen]."""
    token = _ROUTED.set(routed := [])
    try:
        yield routed
    finally:
        _ROUTED.reset(token)


def expert_output(gate_up, down, biases, x_MD: jax.Array, cfg: Config) -> jax.Array:
    """One expert's output for M tokens, float32 [M, D]. `biases`: of gate_up and down, or None."""
    e = cfg.experts
    gate_up_bias, down_bias = biases
    gate, up = jnp.split(plus(linear(gate_up, x_MD), gate_up_bias), 2, axis=-1)
    if e.clamp is None:
        h = activated(gate, up, cfg)
    else:
        gate, up = jnp.minimum(gate, e.clamp), jnp.clip(up, -e.clamp, e.clamp)
        h = (up + 1) * gate * jax.nn.sigmoid(gate * jnp.asarray(1.702, gate.dtype))
    y = linear(down, h, jnp.float32)
    return plus(y, None if down_bias is None else down_bias.astype(jnp.float32))


def shared_output(p: Experts, x_MD: jax.Array, cfg: Config) -> jax.Array | None:
    """What all tokens get, float32 [M, D]; None without a shared expert."""
    if p.shared is None:
        return None
    y = mlp(p.shared, x_MD[None], cfg)[0].astype(jnp.float32)
    if p.shared_scale is not None:
        y = y * jax.nn.sigmoid(linear(p.shared_scale, x_MD, jnp.float32))
    return y


@mlp.register
def _(p: Experts, x_BTD, cfg: Config):
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    expert_Mc, weight_Mc = routing(p, x_MD, cfg)
    with jax.named_scope("experts"):
        few = expert_Mc.size <= min(FEW_PAIRS, cfg.experts.count)
        if hasattr(p.expert_gate_up, "each"):
            apply = _each_alone
        else:
            apply = _by_pairs if few else _one_by_one
        y_MD = apply(p, x_MD, expert_Mc, weight_Mc, cfg)
        if (shared := shared_output(p, x_MD, cfg)) is not None:
            y_MD = y_MD + shared
    return y_MD.astype(x_BTD.dtype).reshape(x_BTD.shape)


def _stacks(p: Experts):
    return p.expert_gate_up, p.expert_down, (p.expert_gate_up_bias, p.expert_down_bias)


def _by_pairs(p: Experts, x_MD, expert_Mc, weight_Mc, cfg):
    """Each pair's expert is read from the stack, and no other."""
    M, c = expert_Mc.shape
    take = lambda a: jnp.take(a, expert_Mc.reshape(-1), axis=0)
    one = lambda stacks, x_D: expert_output(*stacks, x_D[None], cfg)[0]
    y_PD = jax.vmap(one)(jax.tree.map(take, _stacks(p)), jnp.repeat(x_MD, c, axis=0))
    y_McD = y_PD.reshape(M, c, -1) * weight_Mc[..., None]
    return functools.reduce(jnp.add, [y_McD[:, i] for i in range(c)])


def weight_of(expert, expert_Mc: jax.Array, weight_Mc: jax.Array) -> jax.Array:
    """The weight that each token gives to an expert, [M, 1]; 0 where it is not routed to it."""
    return jnp.sum(jnp.where(expert_Mc == expert, weight_Mc, 0.0), axis=-1)[:, None]


def _each_alone(p: Experts, x_MD, expert_Mc, weight_Mc, cfg):
    """`_one_by_one` for experts that are arrays of their own, in any kind that has such arrays as
    `each`, and makes the two matrices from one of them."""
    y_MD = jnp.zeros(x_MD.shape, jnp.float32)
    stack, _, biases = _stacks(p)
    for expert, flat in enumerate(stack.each):
        own = tuple(None if b is None else b[expert] for b in biases)
        weight_M1 = weight_of(expert, expert_Mc, weight_Mc)
        y = expert_output(*stack.matrices(flat, expert), own, x_MD, cfg)
        y_MD = y_MD + jnp.where(weight_M1 > 0, y * weight_M1, 0.0)
    return y_MD


def _one_by_one(p: Experts, x_MD, expert_Mc, weight_Mc, cfg):
    """Each expert is applied to all tokens; a token's weight is 0 where it is not routed to it."""

    def turn(y_MD, given):
        stacks, expert = given
        weight_M1 = weight_of(expert, expert_Mc, weight_Mc)
        y = expert_output(*stacks, x_MD, cfg)
        return y_MD + jnp.where(weight_M1 > 0, y * weight_M1, 0.0), None

    start = jnp.zeros(x_MD.shape, jnp.float32)
    return jax.lax.scan(turn, start, (_stacks(p), jnp.arange(cfg.experts.count)))[0]
