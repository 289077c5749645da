"""What the kernels compute, in plain jnp: the specification, and the path where no kernel runs.

Letters: B batch, T query positions, S slots, N query heads, K kv heads (K' of a group), G = N/K,
H head size, h = H/2, R rank, g groups.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.lowrank_attention.latents import Latents, dense
from pallas_kernels.precision import precision

HIDDEN = -1e30


def product(equation: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """einsum of operands rounded to `dtype`, added in float32.

    The CPU backend lacks some of these products of 16-bit operands: there they are widened, which
    changes nothing but the order of the sum.
    """
    wide = jnp.float32 if jax.default_backend() == "cpu" else dtype
    a, b = (x.astype(dtype).astype(wide) for x in (a, b))
    return jnp.einsum(
        equation, a, b, precision=precision(dtype), preferred_element_type=jnp.float32
    )


def group_heads(heads: int, groups: int, most: int, kv_heads: int | None) -> tuple[int, ...]:
    """kv heads of each group: `most` but for the last, which may have fewer.

    Without `kv_heads` it is the largest number that gives `groups` groups and divides `heads`.
    """
    if kv_heads is None:
        fits = [k for k in range(groups * most, (groups - 1) * most, -1) if heads % k == 0]
        if not fits:
            raise ValueError(f"{heads} query heads fit no {groups} groups of {most} kv heads")
        kv_heads = fits[0]
    return (most,) * (groups - 1) + (kv_heads - (groups - 1) * most,)


def turn(x_BSKH: jax.Array, position_BS: jax.Array, frequencies: Any) -> jax.Array:
    """float32 x with pairs (i, i + H/2) turned by position x frequency."""
    with jax.named_scope("rope"):
        angle = position_BS.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None]
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        a, b = jnp.split(x_BSKH, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def rebuilt_heads(
    z_BSR: jax.Array,
    up_gRKH: jax.Array,
    ranks: Sequence[int],
    heads: Sequence[int],
    mean_coefficient_BS: jax.Array | None,
    mean_KH: jax.Array | None,
    bias_KH: jax.Array | None,
    dtype: Any,
) -> jax.Array:
    """Keys or values from latents: z @ up + coefficient * mean + bias, [B, S, K, H] in `dtype`.

    `ranks` and `heads` are those of the groups; `mean_KH` and `bias_KH` may be None. Products take
    operands of z's dtype and add in float32.
    """
    parts, at = [], 0
    for up_RKH, rank, count in zip(up_gRKH, ranks, heads, strict=True):
        z, up = z_BSR[..., at : at + rank], up_RKH[:rank, :count]
        parts.append(product("BSR,RKH->BSKH", z, up, z.dtype).astype(dtype))
        at += rank
    y_BSKH = jnp.concatenate(parts, axis=2)
    if mean_KH is not None:
        coefficient = mean_coefficient_BS[..., None, None].astype(dtype)
        y_BSKH = y_BSKH + coefficient * mean_KH.astype(dtype)[None, None]
    if bias_KH is not None:
        y_BSKH = y_BSKH + bias_KH.astype(dtype)[None, None]
    return y_BSKH


def finish(
    y_BTNR: jax.Array,
    coefficient_BTN: jax.Array | None,
    up_v_gRKH: jax.Array | None,
    heads: Sequence[int],
    v_bias_KH: jax.Array | None,
    v_mean_KH: jax.Array | None,
    dtype: Any,
) -> jax.Array:
    """Values [B, T, N, H] from averaged latents (float32 [B, T, N, R_v]) and averaged
    coefficients of the mean."""
    if up_v_gRKH is None:
        return y_BTNR.astype(dtype)
    B, T, N, _ = y_BTNR.shape
    K, shared = sum(heads), N // sum(heads)
    if len(set(heads)) == 1:  # one batched product
        y = y_BTNR.reshape(B, T, len(heads), heads[0], shared, -1)
        y_BTNH = product("BTgKGR,gRKH->BTgKGH", y, up_v_gRKH, dtype).reshape(B, T, N, -1)
    else:
        parts, at = [], 0
        for up_RKH, count in zip(up_v_gRKH, heads, strict=True):
            y = y_BTNR[:, :, at * shared : (at + count) * shared]
            y = y.reshape(B, T, count, shared, -1)
            parts.append(product("BTKGR,RKH->BTKGH", y, up_RKH[:, :count], dtype))
            at += count
        y_BTNH = jnp.concatenate(parts, axis=2).reshape(B, T, N, -1)
    spread = lambda a: jnp.repeat(a.astype(jnp.float32).reshape(K, -1), shared, axis=0)[None, None]
    if v_mean_KH is not None:
        y_BTNH = y_BTNH + coefficient_BTN[..., None] * spread(v_mean_KH)
    if v_bias_KH is not None:
        y_BTNH = y_BTNH + spread(v_bias_KH)
    return y_BTNH.astype(dtype)


def lowrank_attention_reference(
    q_BTNH: jax.Array,
    k: Latents,
    v: Latents,
    up_k_gRKH: jax.Array,
    up_v_gRKH: jax.Array | None,
    frequencies: Any,
    lengths_B: jax.Array,
    *,
    ranks: tuple[Sequence[int], Sequence[int]],
    heads: Sequence[int],
    mask_BTS: jax.Array | None = None,
    position_BS: jax.Array | None = None,
    k_bias_KH: jax.Array | None = None,
    v_bias_KH: jax.Array | None = None,
    mean_coefficient_BS: jax.Array | None = None,
    k_mean_KH: jax.Array | None = None,
    v_mean_KH: jax.Array | None = None,
    k_norm_H: jax.Array | None = None,
    norm_eps: float = 1e-6,
) -> jax.Array:
    """As `lowrank_attention`; `ranks` are those of the groups of k and v, `heads` their kv heads.

    Products take operands of q's dtype and add in float32; all else is float32.
    """
    (B, T, N, H), dtype, S = q_BTNH.shape, q_BTNH.dtype, k.codes_BSP.shape[1]
    shared, f32 = N // sum(heads), jnp.float32
    exists_BS = jnp.arange(S, dtype=jnp.int32)[None] < lengths_B[:, None]
    kept = lambda z_BSR: jnp.where(
        exists_BS[..., None], z_BSR, 0
    )  # slots that do not exist may hold NaN
    zk, zv = kept(dense(k, dtype)), kept(dense(v, dtype))
    coefficient_BS = None
    if mean_coefficient_BS is not None:
        coefficient_BS = jnp.where(exists_BS, mean_coefficient_BS.astype(f32), 0)
    if position_BS is None:
        position_BS = jnp.arange(S, dtype=jnp.int32)[None]
    seen = exists_BS[:, None] if mask_BTS is None else exists_BS[:, None] & mask_BTS
    y, coefficients, at, first = [], [], [0, 0], 0
    for i, (rank_k, rank_v, count) in enumerate(zip(*ranks, heads, strict=True)):
        own = slice(first, first + count)
        mean, bias = (None if a is None else a[own] for a in (k_mean_KH, k_bias_KH))
        z, up = zk[..., at[0] : at[0] + rank_k], up_k_gRKH[i : i + 1]
        key = rebuilt_heads(z, up, (rank_k,), (count,), coefficient_BS, mean, bias, f32)
        if k_norm_H is not None:
            key = key * jax.lax.rsqrt(jnp.mean(key * key, -1, keepdims=True) + norm_eps)
            key = key * k_norm_H.astype(f32)[None, None, None]
        key = turn(key, position_BS, jnp.asarray(frequencies, f32))
        query = q_BTNH[:, :, first * shared : (first + count) * shared]
        query = query.reshape(B, T, count, shared, H)
        score = product("BTKGH,BSKH->BKGTS", query, key, dtype) * H**-0.5
        p = jax.nn.softmax(jnp.where(seen[:, None, None], score, HIDDEN), axis=-1)
        part = product("BKGTS,BSR->BTKGR", p, zv[..., at[1] : at[1] + rank_v], dtype)
        padding = max(ranks[1]) - rank_v
        part = part.reshape(B, T, count * shared, rank_v)
        y.append(jnp.pad(part, ((0, 0), (0, 0), (0, 0), (0, padding))))
        if v_mean_KH is not None:
            coefficients.append(product("BKGTS,BS->BTKG", p, coefficient_BS, f32).reshape(B, T, -1))
        at, first = [at[0] + rank_k, at[1] + rank_v], first + count
    coefficient_BTN = jnp.concatenate(coefficients, axis=2) if coefficients else None
    y_BTNR = jnp.concatenate(y, axis=2)
    return finish(y_BTNR, coefficient_BTN, up_v_gRKH, heads, v_bias_KH, v_mean_KH, dtype)
