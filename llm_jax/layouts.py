"""Layouts of other JAX projects: bonsai, tunix, gemma and MaxText; `Layout` reads them."""

import numpy as np

from llm_jax.config import Config
from llm_jax.layout import Entry, Layout


def _bonsai(kernel: str, table: str, gain: str) -> tuple[Entry, ...]:
    at = "layers/{}/"
    proj = f"_proj/{kernel}"
    return (
        Entry(f"embedder/{table}", "VD->V,D", ("embed_VD",)),
        Entry(f"final_norm/{gain}", "D->D", ("norm",)),
        Entry(f"lm_head/{kernel}", "DV->V,D", ("head_DV",), when_tied="copy"),
        Entry(f"{at}input_layernorm/{gain}", "D->D", ("attn_norm",)),
        Entry(f"{at}post_attention_layernorm/{gain}", "D->D", ("mlp_norm",)),
        Entry(f"{at}attn/q{proj}", "DNH->NH,D", ("q",)),
        Entry(f"{at}attn/k{proj}", "DKH->KH,D", ("k",)),
        Entry(f"{at}attn/v{proj}", "DKH->KH,D", ("v",)),
        Entry(f"{at}attn/o{proj}", "NHD->D,NH", ("o",)),
        Entry(f"{at}attn/q_norm/{gain}", "H->H", ("q_norm",)),
        Entry(f"{at}attn/k_norm/{gain}", "H->H", ("k_norm",)),
        Entry(f"{at}mlp/gate_proj/kernel", "DF->F,D", ("gate",)),
        Entry(f"{at}mlp/up_proj/kernel", "DF->F,D", ("up",)),
        Entry(f"{at}mlp/down_proj/kernel", "FD->D,F", ("down",)),
    )


BONSAI_QWEN3 = Layout("jax-ml/bonsai (Qwen3)", _bonsai("w", "input_emb", "w"))
"""`bonsai.models.qwen3`, whose projections are its own Einsum modules."""
BONSAI_QWEN3_KERNELS = Layout(
    "jax-ml/bonsai (Qwen3, kernels)", _bonsai("kernel", "embedding", "scale")
)
"""The same with NNX's names, as its later versions have them."""


def _gemma3(at: str, more: tuple[Entry, ...], norm: str) -> tuple[Entry, ...]:
    gains = dict(
        attn_norm="pre_attention_norm", attn_out_norm="post_attention_norm",
        mlp_norm="pre_ffw_norm", mlp_out_norm="post_ffw_norm",
        q_norm="attn/_query_norm", k_norm="attn/_key_norm",
    )  # fmt: skip
    axes = lambda field: "H->H" if field in ("q_norm", "k_norm") else "D->D"
    return (
        Entry("embedder/input_embedding", "VD->V,D", ("embed_VD",)),
        Entry(f"final_norm/{norm}", "D->D", ("norm",)),
        Entry(f"{at}attn/q_einsum/w", "NDH->NH,D", ("q",)),
        Entry(f"{at}attn/kv_einsum/w", "CKDH->KH,D", ("k", "v")),
        Entry(f"{at}attn/attn_vec_einsum/w", "NHD->D,NH", ("o",)),
        *(Entry(f"{at}{path}/{norm}", axes(field), (field,)) for field, path in gains.items()),
        *more,
    )


TUNIX_GEMMA3 = Layout(
    "google/tunix (Gemma 3)",
    _gemma3(
        "layers/{}/",
        (
            Entry("layers/{}/mlp/gate_proj/kernel", "DF->F,D", ("gate",)),
            Entry("layers/{}/mlp/up_proj/kernel", "DF->F,D", ("up",)),
            Entry("layers/{}/mlp/down_proj/kernel", "FD->D,F", ("down",)),
        ),
        "scale",
    ),
)
"""`tunix.models.gemma3`, NNX. Sizes with as many kv heads as query heads are not known here."""
GEMMA3 = Layout(
    "google-deepmind/gemma (Gemma 3)",
    _gemma3(
        "layer_{}/",
        (
            Entry("layer_{}/mlp/gating_einsum", "CFD->F,D", ("gate", "up")),
            Entry("layer_{}/mlp/linear", "FD->D,F", ("down",)),
        ),
        "scale",
    ),
)
"""The parameters of `gemma.gm.nn` (Linen): what is under "params"."""


def _interleaved(part: np.ndarray, cfg: Config, to_hf: bool) -> np.ndarray:
    """[heads, H, D] with rotated pairs as halves (Hugging Face) or as neighbours (MaxText)."""
    heads, H, D = part.shape
    if to_hf:
        return part.reshape(heads, H // 2, 2, D).swapaxes(1, 2).reshape(part.shape)
    return part.reshape(heads, 2, H // 2, D).swapaxes(1, 2).reshape(part.shape)


def _scaled_query(part: np.ndarray, cfg: Config, to_hf: bool) -> np.ndarray:
    """The same, of queries that are divided by sqrt(H) already."""
    factor = np.float32(cfg.head_dim**0.5)
    turned = _interleaved(part, cfg, to_hf).astype(np.float32)
    return (turned * factor if to_hf else turned / factor).astype(part.dtype)


def _maxtext(scanned: bool, llama: bool) -> tuple[Entry, ...]:
    at = "decoder/layers/" if scanned else "decoder/layers_{}/"
    put = lambda axes: axes[:1] + "L" + axes[1:] if scanned else axes  # `param_scan_axis` 1
    entry = lambda path, axes, field, **more: Entry(at + path, put(axes), (field,), **more)
    rotate = lambda change: dict(change=change) if llama else {}
    norms = () if llama else (
        entry("self_attention/query_norm/scale", "H->H", "q_norm"),
        entry("self_attention/key_norm/scale", "H->H", "k_norm"),
    )  # fmt: skip
    return (
        Entry("token_embedder/embedding", "VD->V,D", ("embed_VD",)),
        Entry("decoder/decoder_norm/scale", "D->D", ("norm",)),
        Entry("decoder/logits_dense/kernel", "DV->V,D", ("head_DV",)),
        entry("pre_self_attention_layer_norm/scale", "D->D", "attn_norm"),
        entry("post_self_attention_layer_norm/scale", "D->D", "mlp_norm"),
        entry("self_attention/query/kernel", "DNH->NH,D", "q", **rotate(_scaled_query)),
        entry("self_attention/key/kernel", "DKH->KH,D", "k", **rotate(_interleaved)),
        entry("self_attention/value/kernel", "DKH->KH,D", "v"),
        entry("self_attention/out/kernel", "NHD->D,NH", "o"),
        *norms,
        entry("mlp/wi_0/kernel", "DF->F,D", "gate"),
        entry("mlp/wi_1/kernel", "DF->F,D", "up"),
        entry("mlp/wo/kernel", "FD->D,F", "down"),
    )


MAXTEXT_LLAMA = Layout("MaxText (Llama)", _maxtext(scanned=False, llama=True))
"""What is under "params". Rotated pairs are neighbours, queries are divided by sqrt(H)."""
MAXTEXT_LLAMA_SCANNED = Layout("MaxText (Llama, scanned)", _maxtext(scanned=True, llama=True))
"""The same with all layers in one stack, along the second axis."""
MAXTEXT_QWEN3 = Layout("MaxText (Qwen3)", _maxtext(scanned=False, llama=False))
MAXTEXT_QWEN3_SCANNED = Layout("MaxText (Qwen3, scanned)", _maxtext(scanned=True, llama=False))
