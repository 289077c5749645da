"""A Qwen3 in Flax NNX of the shape that jax-ml/bonsai gives it: its modules, names and axes.

bonsai is on no package index, so this is written here. Decoding is the model's own: a cache that
knows how many tokens it holds, and a mask made from that.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import llm_jax
from llm_jax import layouts
from llm_jax.testing import tiny_config, tiny_params

CFG = tiny_config("qwen3", layers=3, d_model=64, head_dim=16, vocab=97, d_ff=96)


class Einsum(nnx.Module):
    def __init__(self, text, shape, rngs):
        self.text, self.shape = text, shape
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape) / 8)

    def __call__(self, x):
        return jnp.einsum(self.text, x, self.w[...])


class RMSNorm(nnx.Module):
    def __init__(self, size, eps):
        self.w, self.eps = nnx.Param(jnp.ones(size)), eps

    def __call__(self, x):
        rms = jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + self.eps)
        return self.w[...].reshape((1,) * (x.ndim - 1) + (-1,)) * x / rms


class Embedder(nnx.Module):
    def __init__(self, V, D, rngs):
        self.input_emb = nnx.Param(jax.random.normal(rngs.params(), (V, D)))

    def encode(self, tokens):
        return self.input_emb[tokens]


def rotate(x, position, theta):
    half = x.shape[-1] // 2
    power = -jnp.arange(half, dtype=jnp.float32) / half
    angle = position.astype(jnp.float32)[..., None] * (theta**power)[None, None]
    sin, cos = jnp.sin(angle)[:, :, None], jnp.cos(angle)[:, :, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nnx.Module):
    def __init__(self, cfg, rngs):
        D, N, K, H = cfg.d_model, cfg.heads, cfg.kv_heads, cfg.head_dim
        self.q_proj = Einsum("BTD,DNH->BTNH", (D, N, H), rngs)
        self.k_proj = Einsum("BSD,DKH->BSKH", (D, K, H), rngs)
        self.v_proj = Einsum("BSD,DKH->BSKH", (D, K, H), rngs)
        self.o_proj = Einsum("BTNH,NHD->BTD", (N, H, D), rngs)
        self.q_norm, self.k_norm = RMSNorm(H, cfg.norm_eps), RMSNorm(H, cfg.norm_eps)
        self.theta = cfg.rope_theta

    def __call__(self, x, position, mask, write):
        """`write(k, v)` puts new keys and values into a cache and gives all of them."""
        q = rotate(self.q_norm(self.q_proj(x)), position, self.theta)
        k = rotate(self.k_norm(self.k_proj(x)), position, self.theta)
        k, v = write(k, self.v_proj(x))
        B, T, N, H = q.shape
        q = q.reshape(B, T, k.shape[2], -1, H)
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k) * H**-0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -2.4e38), axis=-1)
        return self.o_proj(jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(B, T, N, H))


class MLP(nnx.Module):
    def __init__(self, cfg, rngs):
        dense = lambda *sizes: nnx.Linear(*sizes, use_bias=False, rngs=rngs)
        self.gate_proj = dense(cfg.d_model, cfg.d_ff)
        self.up_proj = dense(cfg.d_model, cfg.d_ff)
        self.down_proj = dense(cfg.d_ff, cfg.d_model)

    def __call__(self, x):
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    def __init__(self, cfg, rngs):
        self.input_layernorm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attn = Attention(cfg, rngs)
        self.post_attention_layernorm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.mlp = MLP(cfg, rngs)

    def __call__(self, x, position, mask, write):
        x = x + self.attn(self.input_layernorm(x), position, mask, write)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3(nnx.Module):
    def __init__(self, cfg, rngs):
        self.embedder = Embedder(cfg.vocab, cfg.d_model, rngs)
        self.layers = nnx.List([Layer(cfg, rngs) for _ in range(cfg.layers)])
        self.final_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.lm_head = Einsum("BTD,DV->BTV", (cfg.d_model, cfg.vocab), rngs)

    def __call__(self, tokens):
        """Logits of a whole text, without a cache."""
        T = tokens.shape[1]
        position, x = jnp.arange(T)[None], self.embedder.encode(tokens)
        mask = jnp.tril(jnp.ones((1, T, T), bool))
        for layer in self.layers:
            x = layer(x, position, mask, lambda k, v: (k, v))
        return self.lm_head(self.final_norm(x))


@nnx.jit
def _step(model, tokens, caches, count):
    """(logits after the last token, caches) of new tokens behind `count` others."""
    T, S = tokens.shape[1], caches[0][0].shape[1]
    position = count + jnp.arange(T)[None]
    mask = jnp.arange(S)[None, None] <= position[:, :, None]
    x, new = model.embedder.encode(tokens), []
    for layer, (k, v) in zip(model.layers, caches, strict=True):

        def write(own_k, own_v, k=k, v=v):
            put = lambda a, b: jax.lax.dynamic_update_slice(a, b, (0, count, 0, 0))
            new.append((put(k, own_k), put(v, own_v)))
            return new[-1]

        x = layer(x, position, mask, write)
    return model.lm_head(model.final_norm(x))[:, -1], new


def plain(model, prompt, count, slots=128):
    """The model's own greedy decoding: `count` tokens behind the prompt."""
    K, H = model.layers[0].attn.k_proj.shape[1:]
    caches = [(jnp.zeros((1, slots, K, H)),) * 2 for _ in model.layers]
    tokens = list(prompt)
    logits, caches = _step(model, jnp.array([tokens]), caches, jnp.int32(0))
    while len(tokens) < len(prompt) + count:
        tokens.append(int(logits.argmax()))
        at = jnp.int32(len(tokens) - 1)
        logits, caches = _step(model, jnp.array([tokens[-1:]]), caches, at)
    return tokens[len(prompt) :]


def tiny(cfg=CFG, seed=0):
    """(the module, `llm_jax`'s parameters with the same numbers)."""
    params = tiny_params(cfg, seed)
    model = Qwen3(cfg, nnx.Rngs(0))
    tree = layouts.BONSAI_QWEN3.from_hf(llm_jax.params_to_hf(params, cfg), cfg)
    nnx.update(model, nnx.State(tree))
    return model, params


def in_float64(params, tokens, cfg=CFG):
    """Logits [T, V] of the text, in NumPy and float64, from `llm_jax`'s parameters."""
    wide = lambda a: np.asarray(a, np.float64)
    norm = lambda x, g: x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * wide(g)
    T, N, K, H = len(tokens), cfg.heads, cfg.kv_heads, cfg.head_dim
    angle = np.arange(T)[:, None] * cfg.rope_theta ** (-np.arange(H // 2) / (H // 2))

    def rope(x):
        a, b = np.split(x, 2, -1)
        sin, cos = np.sin(angle)[:, None], np.cos(angle)[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = wide(params.embed_VD)[tokens]
    for layer in params.layers:
        a, m, h = layer.attn, layer.mlp, norm(x, layer.attn_norm)
        q = rope(norm((h @ wide(a.q)).reshape(T, N, H), a.q_norm)).reshape(T, K, N // K, H)
        k = rope(norm((h @ wide(a.k)).reshape(T, K, H), a.k_norm))
        scores = np.einsum("tkgh,skh->kgts", q, k) / np.sqrt(H)
        scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        y = np.einsum("kgts,skh->tkgh", p, (h @ wide(a.v)).reshape(T, K, H))
        x = x + y.reshape(T, N * H) @ wide(a.o)
        h = norm(x, layer.mlp_norm)
        gate = h @ wide(m.gate)
        x = x + (gate / (1 + np.exp(-gate)) * (h @ wide(m.up))) @ wide(m.down)
    return norm(x, params.norm) @ wide(params.head_DV)
