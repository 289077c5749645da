"""Named arrays and a description in one safetensors file, with a checksum of each."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llm_jax.digest import array_digest, json_digest
from llm_jax.files import atomic_file
from qyolop_jax import QyolopError

CHECKSUMS = "checksums"
"""The key of the checksums in a file's description: by array, and of all the rest under HEADER."""
HEADER = ""


def write_arrays(path: str | Path, arrays: dict[str, np.ndarray], about: dict[str, str]) -> None:
    """Writes arrays and a description of them, whole or not at all."""
    arrays = {name: np.asarray(a, order="C") for name, a in arrays.items()}  # else written wrongly
    checksums = {name: array_digest(a) for name, a in arrays.items()}
    checksums[HEADER] = _header_digest(arrays, about)
    with atomic_file(path) as scratch:
        try:
            save_file(arrays, scratch, about | {CHECKSUMS: json.dumps(checksums)})
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"{path} cannot be written: {error}") from error


def read_arrays(
    path: str | Path, key: str, error: type[QyolopError], check: bool = True
) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """(description, arrays) in a file of `write_arrays` whose description has this key.

    `error` is raised, and says what is wrong, for any other file, a damaged one, and one with
    numbers that are not finite. Without `check` no checksum is looked at.
    """
    path = Path(path)
    if not path.is_file():
        raise error(f"there is no file {path}; train a model first")
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as wrong:  # safetensors and NumPy raise errors of several types
        why = " ".join(str(wrong).split())
        raise error(f"{path} is not a whole safetensors file: {why}; make it again") from wrong
    if key not in about:
        raise error(f"{path} holds no Q-YOLOP model of this kind; expected {key} in its header")
    if check:
        _compare(path, arrays, about, error)
    if (name := not_finite(arrays)) is not None:
        raise error(f"{path}: {name} holds NaN or infinity; train the model again")
    return about, arrays


def _compare(path: Path, arrays: dict, about: dict[str, str], error: type[QyolopError]) -> None:
    again = "copy or make the file again"
    try:
        checksums = json.loads(about[CHECKSUMS])
        names = set(checksums)
    except (KeyError, ValueError, TypeError, RecursionError) as wrong:
        raise error(f"{path} has no checksums, so it may be damaged; {again}") from wrong
    if not isinstance(checksums, dict) or checksums.get(HEADER) != _header_digest(arrays, about):
        raise error(f"{path}: the header is damaged; {again}")
    if names != arrays.keys() | {HEADER}:
        raise error(f"{path} lacks arrays, or their checksums; {again}")
    for name, a in arrays.items():
        if checksums[name] != array_digest(a):
            raise error(f"{path}: {name} is damaged, as its checksum says; {again}")


def _header_digest(arrays: Mapping[str, np.ndarray], about: dict[str, str]) -> str:
    kinds = {name: [str(a.dtype), list(a.shape)] for name, a in arrays.items()}
    return json_digest([kinds, {k: v for k, v in about.items() if k != CHECKSUMS}])


def not_finite(tree: Any) -> str | None:
    """The name of the first array of a tree of dicts that holds NaN or infinity, None without."""
    for path, a in jax.tree_util.tree_leaves_with_path(tree):
        a = np.asarray(a)
        if jnp.issubdtype(a.dtype, jnp.floating) and not np.isfinite(a).all():
            return array_name(path)
    return None


def array_name(path: tuple) -> str:
    """The name of an array in a tree of dicts: its keys with / between them."""
    return "/".join(str(key.key) for key in path)
