"""What the kernels compute, once more, in float64 NumPy and without a line in common with them."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.lowrank_attention.latents import Latents, dense


def f64(x: Any) -> np.ndarray:
    """The numbers of an array of any dtype."""
    return np.asarray(jnp.asarray(x).astype(jnp.float32), np.float64)


def tree_attention(q, k, v, mask, *, sinks_N=None, rows=None, scale=None, softcap=None):
    """As `pallas_kernels.tree_attention`; rows of caches that exist."""
    q, k, v, mask = f64(q), f64(k), f64(v), np.asarray(mask)
    if rows is not None:
        row, live = (np.asarray(a) for a in rows)
        k, v = k[row], v[row]
        mask = mask & (np.arange(mask.shape[-1]) < live[:, None, None])
    S = mask.shape[-1]
    k, v = (np.repeat(a[:, :S], q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    score = np.einsum("btnh,bsnh->bnts", q, k) * (scale or q.shape[-1] ** -0.5)
    if softcap is not None:
        score = softcap * np.tanh(score / softcap)
    score = np.where(mask[:, None], score, -np.inf)
    most = score.max(-1, keepdims=True)
    weight = np.exp(score - most)
    total = weight.sum(-1, keepdims=True)
    if sinks_N is not None:
        total = total + np.exp(f64(sinks_N)[None, :, None, None] - most)
    return np.einsum("bnts,bsnh->btnh", weight / total, v)


def rotary_cache(y, bias, cos, sin, k, v, place):
    """As `pallas_kernels.rotary_cache`: pairs are complex numbers."""
    y, k, v = f64(y), f64(k).copy(), f64(v).copy()
    (T, h), (K, H) = cos.shape, k.shape[2:]
    y = y.sum(0) + (0 if bias is None else f64(bias))
    heads = y.reshape(T, -1, H)
    turn = f64(cos) + 1j * f64(sin)
    z = (heads[..., :h] + 1j * heads[..., h:]) * turn[:, None]
    turned = np.concatenate([z.real, z.imag], -1)
    N = heads.shape[1] - 2 * K
    for t, (row, slot) in enumerate(zip(*map(np.asarray, place), strict=True)):
        if row < k.shape[0] and slot < k.shape[1]:
            k[row, slot], v[row, slot] = turned[t, N : N + K], heads[t, N + K :]
    return turned[:, :N], k, v


def lowrank_attention(
    q, k: Latents, v: Latents, up_k, up_v, frequencies, lengths, *, mask_BTS=None,
    position_BS=None, k_bias_KH=None, v_bias_KH=None, mean_coefficient_BS=None, k_mean_KH=None,
    v_mean_KH=None, k_norm_H=None, norm_eps=1e-6, kv_heads=None,
):  # fmt: skip
    """The formula of `pallas_kernels.lowrank_attention`, one head of one sequence after another."""
    B, T, N, H = q.shape
    g, _, most, _ = up_k.shape
    K = kv_heads or g * most
    zk, zv, q, up_k, up_v = f64(dense(k)), f64(dense(v)), f64(q), f64(up_k), f64(up_v)
    starts = [np.concatenate([[0], np.cumsum(z.blocks)]) for z in (k, v)]
    y = np.zeros((B, T, N, H))
    for b in range(B):
        for n in range(N):
            kv = n // (N // K)
            group, head = divmod(kv, most)
            own = [slice(s[group], s[group + 1]) for s in starts]
            rows = [z[b, : int(lengths[b]), o] for z, o in zip((zk, zv), own, strict=True)]
            lead = (
                None if mean_coefficient_BS is None else f64(mean_coefficient_BS)[b, : len(rows[0])]
            )
            keys = rows[0] @ up_k[group, : rows[0].shape[1], head]
            values = rows[1] @ up_v[group, : rows[1].shape[1], head]
            if lead is not None:
                keys = keys + lead[:, None] * f64(k_mean_KH)[kv]
                values = values + lead[:, None] * f64(v_mean_KH)[kv]
            if k_bias_KH is not None:
                keys, values = keys + f64(k_bias_KH)[kv], values + f64(v_bias_KH)[kv]
            if k_norm_H is not None:
                mean = (keys**2).mean(1, keepdims=True)
                keys = keys / np.sqrt(mean + norm_eps) * f64(k_norm_H)
            place = np.arange(len(keys))
            if position_BS is not None:
                place = np.asarray(position_BS)[min(b, len(position_BS) - 1), : len(keys)]
            turn = np.exp(1j * place[:, None] * np.asarray(frequencies, np.float64))
            turned = (keys[:, : H // 2] + 1j * keys[:, H // 2 :]) * turn
            keys = np.concatenate([turned.real, turned.imag], 1)
            for t in range(T):
                score = keys @ q[b, t, n] / np.sqrt(H)
                if mask_BTS is not None:
                    score[~np.asarray(mask_BTS)[min(b, len(mask_BTS) - 1), t, : len(keys)]] = -1e30
                p = np.exp(score - score.max())
                y[b, t, n] = p @ values / p.sum()
    return y
