"""Attention over latents against loops over queries in float64, tree steps included."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.attention import (
    Step,
    attend,
    attention,
    causal_step,
    empty_cache,
    rope_frequencies,
)
from llm_jax.cache import move
from llm_jax.linear import linear
from llm_jax.testing import tiny_config, tiny_params
from pallas_kernels.lowrank_attention.latents import dense
from palu_jax.attention import FEW, attend_either
from palu_jax.convert import Recipe, to_palu
from palu_jax.format import LatentFormat, MixedFormat
from palu_jax.latent import quantize_latents

SLOTS = 48
f64 = lambda a: np.asarray(jnp.asarray(a, jnp.float32), np.float64)
jit_attention = jax.jit(attention, static_argnames="cfg")
jit_move = jax.jit(move)


@functools.cache
def converted(family, recipe_changes=(), seed=0):
    """(config, one layer's PaluAttention) of a model with three kv heads in groups of two."""
    cfg = tiny_config(family, heads=6, kv_heads=3, d_model=48, vocab=64, d_ff=64, layers=1)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(200, cfg.d_model)) + 2 * rng.normal(size=cfg.d_model)
    moments = dict(gram_DD=x.T @ x / 200, mean_D=x.mean(0), grad_k_FF=None)
    query = np.stack([np.eye(cfg.head_dim)] * cfg.kv_heads)
    layer = type("Moments", (), dict(moments, query_KHH=query))
    statistics = type("Statistics", (), dict(layers=(layer,), model=None))
    H = cfg.head_dim
    defaults = dict(groups=(2, 1), ranks=(((H + 4, H - 4), (H + 8, H)),))
    recipe = Recipe(**(defaults | dict(recipe_changes)))
    return cfg, to_palu(tiny_params(cfg), cfg, recipe, statistics).layers[0].attn


@functools.partial(jax.jit, static_argnames=("cfg",))
def latents_of(p, x_BSD, cfg):
    """(exact, quantized) latents of keys and of values; `quantize_latents` has tests of its own."""
    form, found = p.format, []
    for side, f in enumerate((p.k, p.v)):
        z = linear(f.down_DR, x_BSD)
        kept = z.astype(form.dtype or z.dtype)
        low = dense(quantize_latents(kept, *form.layout(side, f.ranks), form.clip))
        found.append((kept.astype(jnp.float32), low))
    return found


def by_hand(p, x_BSD, cfg, queries, seen, position_S):
    """Outputs [B, T, D] of the tokens `queries` of x, slot s being token s.

    `seen[i]` lists the slots that query i looks at; it sees one exactly as computed if that is a
    sink or less than `window` behind it, else as quantized.
    """
    form, H, K, S = p.format, cfg.head_dim, cfg.kv_heads, x_BSD.shape[1]
    angle = np.exp(1j * np.outer(position_S[:S], np.asarray(rope_frequencies(cfg), np.float64)))

    def turned(a_BSNH):
        z = (a_BSNH[..., : H // 2] + 1j * a_BSNH[..., H // 2 :]) * angle[None, :, None]
        return np.concatenate([z.real, z.imag], -1)

    def normed(a, gain):
        if gain is None:
            return a
        return a / np.sqrt((a**2).mean(-1, keepdims=True) + cfg.norm_eps) * f64(gain)

    def rows(f, z_BSR, bias):
        """[B, S, K, H], head by head."""
        out = np.zeros((*z_BSR.shape[:2], K, H))
        starts, up = np.cumsum([0, *f.ranks]), f64(f.up_gRKH)
        for k in range(K):
            group, at = divmod(k, f.heads[0])
            out[:, :, k] = (
                z_BSR[..., starts[group] : starts[group + 1]] @ up[group, : f.ranks[group], at]
            )
        if f.mean_F is not None:
            lead = f64(x_BSD) @ f64(p.mean_probe_D)
            out += lead[..., None, None] * f64(f.mean_F).reshape(K, H)
        return out if bias is None else out + f64(bias).reshape(K, H)

    padded = jnp.pad(x_BSD, ((0, 0), (0, SLOTS - S), (0, 0)))  # one compilation for every length
    zk, zv = ([f64(z)[:, :S] for z in pair] for pair in latents_of(p, padded, cfg))
    keys = [turned(normed(rows(p.k, z, p.k_bias), p.k_norm)) for z in zk]
    values = [rows(p.v, z, p.v_bias) for z in zv]
    q = f64(x_BSD) @ f64(p.q) + (0 if p.q_bias is None else f64(p.q_bias))
    q = turned(normed(q.reshape(*q.shape[:2], -1, H), p.q_norm))
    y = np.zeros((len(q), len(queries), cfg.heads, H))
    for b, i, n in np.ndindex(y.shape[:3]):
        t, k, slots = queries[i], n // (cfg.heads // K), list(seen[i])
        near = [s < form.sinks or position_S[t] - position_S[s] < form.window for s in slots]
        kind = [0 if one else 1 for one in near]
        score = np.array([keys[c][b, s, k] @ q[b, t, n] for c, s in zip(kind, slots)])
        weight = np.exp((score - score.max()) / np.sqrt(H))
        value = np.array([values[c][b, s, k] for c, s in zip(kind, slots)])
        y[b, i, n] = weight / weight.sum() @ value
    return y.reshape(*y.shape[:2], -1) @ f64(p.o)


def tokens(cfg, count, batch=2, seed=5):
    x = np.random.default_rng(seed).normal(size=(batch, count, cfg.d_model))
    return jnp.asarray(x, cfg.dtype)


MIXED = ((((12, 4), (8, 2)), ((12, 3),)), (((8, 8), (16, 3)), ((4, 4), (12, 2))))
"""The classes of one layer with the ranks of `converted`."""
CASES = {
    "16 bits": ("llama", ()),
    "classes": ("qwen2", (("format", MixedFormat(classes=(MIXED,))),)),
    "biases, 4 and 3 bits": ("qwen2", (("format", LatentFormat(4, 3)),)),
    "head norms, 2 bits": ("qwen3", (("format", LatentFormat(2, 2)), ("rotate", False))),
    "scaled rope, blocks": ("llama3", (("format", LatentFormat(3, 4, block=4)),)),
    "sinks and window": ("qwen2", (("format", LatentFormat(2, 2, sinks=2, window=3)),)),
    "window longer than a chunk": ("llama", (("format", LatentFormat(2, 8, window=20)),)),
    "sinks alone": ("qwen3", (("format", LatentFormat(2, 16, sinks=4)),)),
    "mean split": ("qwen2", (("mean_split", True), ("format", LatentFormat(4, 2)))),
    "mean split, window": (
        "qwen3",
        (("mean_split", True), ("format", LatentFormat(2, 2, window=4))),
    ),
}


QUICK = (
    "biases, 4 and 3 bits", "head norms, 2 bits", "sinks and window", "mean split", "4 bits",
    "2 bits, sinks and window", "classes",
)  # fmt: skip
"""One case for each branch of the code; the others are slow."""


def cases(table):
    return [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name not in QUICK))
        for name, case in table.items()
    ]


@pytest.mark.quick_cases("sinks and window", "classes")
@pytest.mark.parametrize("family, changes", cases(CASES))
def test_attention_is_the_float64_formula(family, changes):
    """A prefill that rebuilds, then a few tokens or one through the kernel."""
    cfg, p = converted(family, changes)
    sizes = (FEW + 3, 1 if p.format.value_bits % 4 else 3)
    x = tokens(cfg, sum(sizes))
    cache, got, at = empty_cache(p, cfg, 2, SLOTS), [], 0
    for size in sizes:
        step = causal_step(at, size, SLOTS)
        y, cache = jit_attention(p, x[:, at : at + size], cache, step, cfg=cfg)
        got.append(y)
        at += size
    seen = [range(t + 1) for t in range(at)]
    want = by_hand(p, x, cfg, range(at), seen, np.arange(at))
    np.testing.assert_allclose(jnp.concatenate(got, 1), want, rtol=1e-4, atol=1e-4)


TREE = [-1, 0, 0, 1, 2, 3, 1]
"""Parents: paths 0-1-3-5, 0-1-6, 0-2-4."""


def tree_step(at, parents, first=0):
    """Step of nodes first … of a tree in slots at …; and what each node sees."""
    depth, seen = [], []
    for i, parent in enumerate(parents):
        depth.append(0 if parent < 0 else depth[parent] + 1)
        seen.append([*(seen[parent] if parent >= 0 else range(at)), at + i])
    position_S = np.arange(SLOTS)
    position_S[at : at + len(parents)] = at + np.array(depth)
    mask = np.zeros((1, len(parents) - first, SLOTS), bool)
    for i, slots in enumerate(seen[first:]):
        mask[0, i, slots] = True
    rows = jnp.asarray(at + np.array(depth[first:]), jnp.int32)[None]
    slot_BS = jnp.asarray(position_S, jnp.int32)[None]
    return Step(jnp.int32(at + first), rows, jnp.asarray(mask), slot_BS), seen, position_S


TREE_CASES = {
    "16 bits": ("qwen2", LatentFormat()),
    "4 bits": ("qwen3", LatentFormat(4, 4)),
    "2 bits, sinks and window": ("qwen2", LatentFormat(2, 2, sinks=2, window=4)),
    "wide window": ("llama", LatentFormat(2, 2, window=9)),
}


@pytest.mark.slow
@pytest.mark.parametrize("family, form", cases(TREE_CASES))
def test_trees_and_what_is_kept_of_them(family, form):
    """Text, a draft's rows, the tree itself, rows moved, then text again: rounds, one by one."""
    cfg, p = converted(family, (("format", form),))
    first, scratch = 11, len(TREE) + 3
    x, tree, draft = (tokens(cfg, n, 1, seed) for seed, n in enumerate((first + 3, 7, 10)))
    cache = empty_cache(p, cfg, 1, SLOTS, scratch)
    real = causal_step(0, 16, SLOTS, real=first)  # padded, as a prompt is
    padded = jnp.concatenate([x[:, :first], tokens(cfg, 5, 1, 99)], 1)
    _, cache = jit_attention(p, padded, cache, real, cfg=cfg)
    text, at = x[:, :first], first
    for kept in ([0, 1, 3, 5], [0, 2], [0]):
        wrong = causal_step(at, draft.shape[1], SLOTS)
        _, cache = jit_attention(p, draft, cache, wrong, cfg=cfg)  # whatever the draft leaves
        step, seen, position_S = tree_step(at, TREE)
        y, cache = jit_attention(p, tree, cache, step, cfg=cfg)
        every = jnp.concatenate([text, tree], 1)
        want = by_hand(p, every, cfg, range(at, at + len(TREE)), seen, position_S)
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
        source = np.arange(at, at + len(TREE))
        source[: len(kept)] = at + np.array(kept)
        cache = jit_move(cache, jnp.asarray(source), jnp.int32(at))
        text = jnp.concatenate([text, tree[:, np.array(kept)]], 1)
        at += len(kept)
        tree = tree[:, ::-1]
    y, cache = jit_attention(p, x[:, -1:], cache, causal_step(at, 1, SLOTS), cfg=cfg)
    every = jnp.concatenate([text, x[:, -1:]], 1)
    want = by_hand(p, every, cfg, [at], [range(at + 1)], np.arange(at + 1))
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [FEW, FEW + 2])
def test_fused_values_change_nothing(count):
    """The value factor inside the output projection, few queries and many, biases included."""
    shared = (("groups", (1, 1, 1)), ("ranks", (((12, 8, 16), (10, 10, 10)),)))
    cfg, p = converted("qwen2", shared)
    _, fused = converted("qwen2", (*shared, ("fuse_values", True)))
    assert fused.o.shape == (cfg.heads * 10, cfg.d_model) and fused.v.up_gRKH is None
    x, step = tokens(cfg, count), causal_step(0, count, SLOTS)
    want, _ = jit_attention(p, x, empty_cache(p, cfg, 2, SLOTS), step, cfg=cfg)
    got, _ = jit_attention(fused, x, empty_cache(fused, cfg, 2, SLOTS), step, cfg=cfg)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, form",
    [
        pytest.param("bfloat16", LatentFormat(), marks=pytest.mark.slow),
        pytest.param("bfloat16", LatentFormat(2, 2, window=3), marks=pytest.mark.slow),
        ("float16", LatentFormat(4, 3)),
    ],
)
def test_half_precision_is_near_float32(dtype, form):
    """Nothing is promoted on the way, nothing overflows, and caches have the model's dtype."""
    cfg, p = converted("qwen3", (("format", form), ("mean_split", True)))
    half = dataclasses.replace(cfg, dtype=dtype)
    low = jax.tree.map(lambda a: a.astype(dtype), p)
    x = tokens(cfg, 20)
    want, _ = jit_attention(p, x, empty_cache(p, cfg, 2, SLOTS), causal_step(0, 20, SLOTS), cfg=cfg)
    cache, got = empty_cache(low, half, 2, SLOTS), []
    floats = {a.dtype for a in jax.tree.leaves(cache)} - {jnp.dtype("uint8")}
    assert floats <= {jnp.dtype(dtype), jnp.dtype("bfloat16")}  # steps and offsets are bfloat16
    for at, size in ((0, 18), (18, 1), (19, 1)):
        step = causal_step(at, size, SLOTS)
        piece = x[:, at : at + size].astype(dtype)
        y, cache = jit_attention(low, piece, cache, step, cfg=half)
        assert y.dtype == dtype
        got.append(y.astype(jnp.float32))
    error = jnp.abs(jnp.concatenate(got, 1) - want).mean()
    assert error < (0.03 if form.key_bits == 16 else 0.1) * want.std()


def test_latents_may_be_narrower_than_the_model():
    cfg, p = converted("qwen2", (("format", LatentFormat(dtype="bfloat16")),))
    cache = empty_cache(p, cfg, 1, SLOTS)
    assert cache.k.codes_BSP.dtype == cache.v.codes_BSP.dtype == jnp.bfloat16
    x = tokens(cfg, 20, 1)
    y, cache = jit_attention(p, x, cache, causal_step(0, 20, SLOTS), cfg=cfg)
    want = by_hand(p, x, cfg, [19], [range(20)], np.arange(20))
    np.testing.assert_allclose(y[:, 19:], want, rtol=1e-4, atol=1e-4)


def test_one_program_decodes_and_the_cache_is_written_in_place():
    cfg, p = converted("qwen2", (("format", LatentFormat(4, 2, sinks=1, window=4)),))
    run = chex.assert_max_traces(attention, n=1)
    run = jax.jit(run, static_argnames="cfg", donate_argnums=2)
    cache = empty_cache(p, cfg, 1, SLOTS)
    x = tokens(cfg, 8, 1)
    where = lambda: sorted(a.unsafe_buffer_pointer() for a in jax.tree.leaves(cache))
    before = where()
    for at in range(8):
        y, cache = run(p, x[:, at : at + 1], cache, causal_step(at, 1, SLOTS), cfg=cfg)
    assert np.isfinite(y).all() and where() == before


def test_attend_either_of_equal_versions_is_attend():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    q, k, v, other = draw(2, 3, 4, 8), draw(2, 9, 2, 8), draw(2, 9, 2, 5), draw(2, 9, 2, 5)
    mask = jnp.asarray(rng.random((1, 3, 9)) < 0.6).at[..., 0].set(True)
    old = jnp.asarray(rng.random((2, 3, 9)) < 0.5)
    want = attend(q, k, v, mask)
    np.testing.assert_allclose(attend_either(q, (k, v), (k, v), mask, old), want, atol=1e-5)
    all_old = jnp.ones((1, 3, 9), bool)
    for flag, chosen in ((all_old, v), (~all_old, other)):
        got = attend_either(q, (k, v), (k, other), mask, flag)
        np.testing.assert_allclose(got, attend(q, k, chosen, mask), atol=1e-5)
