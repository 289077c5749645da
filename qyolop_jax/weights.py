"""Trained variables in one safetensors file, with the model's description in its header."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.files import atomic_file
from qyolop_jax import QyolopError
from qyolop_jax.config import ModelConfig
from qyolop_jax.model import Panoptic

KEY = "qyolop"


class WeightsError(QyolopError):
    """A file that does not hold such a network; the message says what is wrong."""


def save_weights(path: Path, cfg: ModelConfig, variables: dict[str, Any]) -> None:
    """Writes the variables of `Panoptic(cfg)`, whole or not at all."""
    from safetensors.numpy import save_file

    flat = {_name(p): np.asarray(a) for p, a in jax.tree_util.tree_leaves_with_path(variables)}
    with atomic_file(path) as scratch:
        save_file(flat, scratch, metadata={KEY: cfg.to_json()})


def load_weights(path: Path) -> tuple[ModelConfig, dict]:
    """(settings, variables) in a file of `save_weights`. WeightsError for any other file."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"there is no file {path}; train a model first")
    try:
        with safe_open(path, framework="numpy") as file:
            header = (file.metadata() or {}).get(KEY)
            if header is None:
                raise WeightsError(f"{path} holds no Q-YOLOP model")
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {error}") from error
    cfg = ModelConfig.from_json(header)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    like = jax.eval_shape(
        lambda key, x: Panoptic(cfg).init(key, x, train=False), jax.random.key(0), images
    )
    names = {_name(p): a for p, a in jax.tree_util.tree_leaves_with_path(like)}
    fits = lambda n: n in flat and n in names and flat[n].shape == names[n].shape
    if wrong := sorted(n for n in names.keys() | flat.keys() if not fits(n)):
        raise WeightsError(
            f"{path}: {len(wrong)} arrays do not fit this version, such as {wrong[0]}"
        )
    return cfg, jax.tree_util.tree_map_with_path(lambda p, _: jnp.asarray(flat[_name(p)]), like)


def not_finite(tree: Any) -> str | None:
    """The name of the first array of a tree of dicts that holds NaN or infinity, None without."""
    for path, a in jax.tree_util.tree_leaves_with_path(tree):
        a = np.asarray(a)
        if jnp.issubdtype(a.dtype, jnp.floating) and not np.isfinite(a).all():
            return _name(path)
    return None


def _name(path) -> str:
    return "/".join(key.key for key in path)
