"""Trained variables in one safetensors file, with the model's description in its header."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qyolop_jax import QyolopError
from qyolop_jax.arrays import array_name, not_finite, read_arrays, write_arrays
from qyolop_jax.config import ModelConfig, ModelConfigError
from qyolop_jax.model import Panoptic

KEY = "qyolop"


class WeightsError(QyolopError):
    """A file that does not hold such a network; the message says what is wrong."""


def save_weights(path: Path, cfg: ModelConfig, variables: dict[str, Any]) -> None:
    """Writes the variables of `Panoptic(cfg)`, whole or not at all. WeightsError for NaN."""
    if (name := not_finite(variables)) is not None:
        raise WeightsError(f"{name} holds NaN or infinity, so {path} is not written; train again")
    flat = {array_name(p): np.asarray(a) for p, a in jax.tree_util.tree_leaves_with_path(variables)}
    write_arrays(path, flat, {KEY: cfg.to_json()})


def load_weights(path: Path, check: bool = True) -> tuple[ModelConfig, dict]:
    """(settings, variables) in a file of `save_weights`. WeightsError for any other file.

    Every array is compared with its checksum, unless `check` is false.
    """
    about, flat = read_arrays(path, KEY, WeightsError, check)
    try:
        cfg = ModelConfig.from_json(about[KEY])
    except ModelConfigError as error:
        raise WeightsError(f"{path}: {error}") from error
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    like = jax.eval_shape(
        lambda key, x: Panoptic(cfg).init(key, x, train=False), jax.random.key(0), images
    )
    names = {array_name(p): a for p, a in jax.tree_util.tree_leaves_with_path(like)}
    kind = lambda a: (a.shape, a.dtype)
    fits = lambda n: n in flat and n in names and kind(flat[n]) == kind(names[n])
    if wrong := sorted(n for n in names.keys() | flat.keys() if not fits(n)):
        raise WeightsError(
            f"{path}: {len(wrong)} arrays do not fit this version, such as {wrong[0]}; train again"
        )
    return cfg, jax.tree_util.tree_map_with_path(
        lambda p, _: jnp.asarray(flat[array_name(p)]), like
    )
