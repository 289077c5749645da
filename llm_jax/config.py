"""What a decoder-only model looks like: sizes and variants, read from Hugging Face's config."""

import dataclasses
from typing import Any

from llm_jax import LLMError


class ConfigError(LLMError):
    """A model description this package cannot run; the message says which field and why."""


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's stretch of the rotary frequencies (`rope_scaling` of type `llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_length: int


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
    rope_scaling: Llama3Rope | None = None
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    """Biases on the q, k and v projections (Qwen2 and Qwen2.5)."""
    qk_norm: bool = False
    """RMS norms over each head of q and k, before the rotation (Qwen3)."""
    tied: bool = False
    """The output head is the embedding table."""
    max_length: int = 2048
    """Positions that the model was trained for, or its sliding window if that is shorter."""
    dtype: str = "bfloat16"
    family: str = "llama"

    def __post_init__(self):
        for name in ("layers", "d_model", "heads", "kv_heads", "head_dim", "d_ff", "vocab"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"{self.heads} query heads cannot share {self.kv_heads} kv heads evenly; "
                "heads must be a multiple of kv_heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary positions need an even one")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")

    @property
    def layer_matrices(self) -> dict[str, tuple[int, int]]:
        """Shape [in, out] of the seven matrices of a layer, in the order they are used."""
        d, n, k, f = (
            self.d_model,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
            self.d_ff,
        )
        return dict(q=(d, n), k=(d, k), v=(d, k), o=(n, d), gate=(d, f), up=(d, f), down=(f, d))

    @property
    def joined_matrices(self) -> dict[str, tuple[int, int]]:
        """Shape [in, out] of the four matrices of a joined layer (`llm_jax.params.joined`)."""
        m = self.layer_matrices
        side = lambda *names: (m[names[0]][0], sum(m[n][1] for n in names))
        return dict(qkv=side(*"qkv"), o=m["o"], gate_up=side("gate", "up"), down=m["down"])

    @property
    def layer_vector_elements(self) -> int:
        """Numbers of a layer that are not in a matrix: norms and biases."""
        vectors = 2 * self.d_model
        if self.qkv_bias:
            vectors += (self.heads + 2 * self.kv_heads) * self.head_dim
        if self.qk_norm:
            vectors += 2 * self.head_dim
        return vectors

    @property
    def layer_matrix_elements(self) -> int:
        """Numbers in the seven matrices of one layer."""
        return sum(rows * columns for rows, columns in self.layer_matrices.values())

    @property
    def parameter_count(self) -> int:
        """All parameters; a tied head is counted once."""
        tables = self.vocab * self.d_model * (1 if self.tied else 2)
        layer = self.layer_matrix_elements + self.layer_vector_elements
        return self.layers * layer + tables + self.d_model


DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Supported dtypes and their bytes per element."""

FAMILIES = {
    # model_type in config.json -> (qkv_bias, qk_norm)
    "llama": (False, False),
    "mistral": (False, False),
    "qwen2": (True, False),
    "qwen3": (False, True),
}


def from_hf(hf: dict[str, Any], dtype: str | None = None) -> Config:
    """The `Config` described by a Hugging Face `config.json`, given as a dictionary.

    Raises `ConfigError` for a family, activation, rope type or bias that this package does not
    have: no model runs as something else.
    """
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"model_type is {family!r}; supported are {', '.join(FAMILIES)}")
    needed = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
    )
    if missing := [name for name in needed if hf.get(name) is None]:
        raise ConfigError(f"config.json lacks {', '.join(missing)}")
    if (act := hf.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ConfigError(f"hidden_act is {act!r}; only silu is supported")
    qkv_bias, qk_norm = FAMILIES[family]
    if family != "qwen2" and hf.get("attention_bias"):
        raise ConfigError(
            f"attention_bias is true; {family} models are supported without biases only"
        )
    if hf.get("mlp_bias"):
        raise ConfigError("mlp_bias is true; MLP biases are not supported")
    rope_theta, rope_scaling = _rope(hf)
    heads = hf["num_attention_heads"]
    length = hf.get("max_position_embeddings", 2048)
    windowed = hf.get("use_sliding_window", family == "mistral")
    if windowed and hf.get("sliding_window"):
        length = min(length, hf["sliding_window"])
    return Config(
        layers=hf["num_hidden_layers"],
        d_model=hf["hidden_size"],
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        d_ff=hf["intermediate_size"],
        vocab=hf["vocab_size"],
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        tied=bool(hf.get("tie_word_embeddings", False)),
        max_length=length,
        dtype=dtype or hf.get("dtype") or hf.get("torch_dtype") or "bfloat16",
        family=family,
    )


def _rope(hf: dict[str, Any]) -> tuple[float, Llama3Rope | None]:
    """Theta and scaling: `rope_scaling` in older files, all of it in `rope_parameters` in newer."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or hf.get("rope_theta") or 10_000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise ConfigError(f"rope type {kind!r} is not supported; known are default and llama3")
    return float(theta), Llama3Rope(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_length=int(rope["original_max_position_embeddings"]),
    )
