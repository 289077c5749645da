"""What a decoder-only model looks like: sizes and variants, read from Hugging Face's config."""

import dataclasses
from typing import Any

from llm_jax.values import ConfigError, Values, short

SIZES = {
    # field of Config -> the largest value; far above any model, far below what fills a memory
    "layers": 10_000,
    "d_model": 2**20,
    "heads": 2**14,
    "kv_heads": 2**14,
    "head_dim": 2**14,
    "d_ff": 2**22,
    "vocab": 2**24,
    "max_length": 2**31 - 1,
}
THETA = (1.0, 1e15)
"""Lowest and highest base of the rotary frequencies."""
EPS = (1e-15, 0.1)
"""Lowest and highest epsilon of the norms."""


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's stretch of the rotary frequencies (`rope_scaling` of type `llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_length: int

    def __post_init__(self):
        values = Values(vars(self), "rope scaling: ")
        values.number("factor", 1.0, 1e6)
        low = values.number("low_freq_factor", 1e-6, 1e6)
        high = values.number("high_freq_factor", 1e-6, 1e6)
        values.integer("original_max_length", 1, SIZES["max_length"])
        if low >= high:
            values.refuse("high_freq_factor", f"more than low_freq_factor, {low:g}")


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
        values = Values(vars(self))
        for name, largest in SIZES.items():
            values.integer(name, 1, largest)
        values.number("rope_theta", *THETA)
        values.number("norm_eps", *EPS)
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"{self.heads} query heads cannot share {self.kv_heads} kv heads evenly; "
                "heads must be a multiple of kv_heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary positions need an even one")
        if values.text("dtype") not in DTYPES:
            values.refuse("dtype", f"one of {', '.join(DTYPES)}")

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

    Raises `ConfigError` for a value of a wrong type or size, for two values that contradict each
    other, and for a family, activation, rope type or bias that this package does not have: no model
    runs as something else.
    """
    values = Values({"sliding_window": 4096} | hf)  # 4096 if unnamed, as in transformers
    family = values.text("model_type", None)
    if family not in FAMILIES:
        raise ConfigError(f"model_type is {short(family)}; supported are {', '.join(FAMILIES)}")
    needed = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
    )
    if missing := [name for name in needed if name not in values]:
        raise ConfigError(f"config.json lacks {', '.join(missing)}")
    if values.text("hidden_act", "silu") not in ("silu", "swish"):
        values.refuse("hidden_act", "silu; no other activation is supported")
    qkv_bias, qk_norm = FAMILIES[family]
    if values.flag("attention_bias") and family != "qwen2":
        values.refuse("attention_bias", f"false; {family} models have no biases here")
    if not values.flag("is_causal", True):
        values.refuse("is_causal", "true; models that look ahead are not supported")
    if values.flag("mlp_bias"):
        values.refuse("mlp_bias", "false; MLP biases are not supported")
    rope_theta, rope_scaling = _rope(values)
    d_model = values.integer("hidden_size", 1, SIZES["d_model"])
    heads = values.integer("num_attention_heads", 1, SIZES["heads"])
    kv_heads = values.integer("num_key_value_heads", 1, SIZES["kv_heads"], None)
    head_dim = values.integer("head_dim", 1, SIZES["head_dim"], None)
    return Config(
        layers=values.integer("num_hidden_layers", 1, SIZES["layers"]),
        d_model=d_model,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=d_model // heads if head_dim is None else head_dim,
        d_ff=values.integer("intermediate_size", 1, SIZES["d_ff"]),
        vocab=values.integer("vocab_size", 1, SIZES["vocab"]),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_eps=values.number("rms_norm_eps", *EPS, 1e-6),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        tied=values.flag("tie_word_embeddings"),
        max_length=_max_length(values, family),
        dtype=dtype or _dtype(values),
        family=family,
    )


def _dtype(values: Values) -> str:
    """The dtype of the file: `torch_dtype` in older ones, `dtype` in newer ones."""
    new, old = values.text("dtype", None), values.text("torch_dtype", None)
    if new and old and new != old:
        values.refuse("dtype", f"what torch_dtype says, {short(old)}; remove the wrong one")
    return new or old or "bfloat16"


def _max_length(values: Values, family: str) -> int:
    """Positions that the model was trained for, or its sliding window if that is shorter."""
    largest = SIZES["max_length"]
    length = values.integer("max_position_embeddings", 1, largest, 2048)
    kinds = values.list_of(str, "layer_types")
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"layer_types has {short(min(unknown))}; only attention is supported")
    windowed = values.flag("use_sliding_window", family == "mistral")
    window = values.integer("sliding_window", 1, largest, None)
    return min(length, window) if window and (windowed or "sliding_attention" in kinds) else length


def _rope(values: Values) -> tuple[float, Llama3Rope | None]:
    """Theta and scaling: `rope_scaling` in older files, all of it in `rope_parameters` in newer.

    transformers lets `rope_scaling` win and forgets the other's theta, so both must say the same.
    """
    if values.number("partial_rotary_factor", 0, 1, 1.0) != 1:
        values.refuse("partial_rotary_factor", "1; partly rotated heads are not supported")
    found = {}
    for name in ("rope_parameters", "rope_scaling"):
        if (rope := values.mapping(name)) is not None:
            found[name] = _rope_theta(values, rope), _rope_scaling(rope)
    if len(set(found.values())) > 1:
        raise ConfigError(
            "rope_parameters and rope_scaling say different things; keep the one that is meant"
        )
    return next(iter(found.values()), (_rope_theta(values, Values({})), None))


def _rope_theta(values: Values, rope: Values) -> float:
    """The base of the frequencies, from inside or outside of the object about rope."""
    inner, outer = (v.number("rope_theta", *THETA, None) for v in (rope, values))
    if inner and outer and inner != outer:
        rope.refuse("rope_theta", f"what rope_theta outside says, {outer:g}; keep one of them")
    return inner or outer or 10_000.0


def _rope_scaling(rope: Values) -> Llama3Rope | None:
    """The scaling that `rope_parameters` or `rope_scaling` describes."""
    names = [name for name in ("rope_type", "type") if name in rope]
    kinds = {rope.text(name) for name in names}
    if len(kinds) > 1:
        rope.refuse("type", "what rope_type says; keep one of them")
    if not kinds and "factor" in rope:
        rope.refuse("rope_type", "a type beside the factor, such as llama3")
    if rope.number("partial_rotary_factor", 0, 1, 1.0) != 1:
        rope.refuse("partial_rotary_factor", "1; partly rotated heads are not supported")
    kind = min(kinds, default="default")
    if kind == "default":
        if rope.number("factor", 0, 1e6, 1.0) != 1:
            rope.refuse("factor", "1, because the type is default; name the type that is meant")
        return None
    if kind != "llama3":
        raise ConfigError(f"rope type {short(kind)} is not supported; known are default and llama3")
    return Llama3Rope(
        factor=rope.number("factor", 1.0, 1e6),
        low_freq_factor=rope.number("low_freq_factor", 1e-6, 1e6),
        high_freq_factor=rope.number("high_freq_factor", 1e-6, 1e6),
        original_max_length=rope.integer(
            "original_max_position_embeddings", 1, SIZES["max_length"]
        ),
    )
