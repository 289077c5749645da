"""Trained models run by other programs, and a check that those compute the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.cli import UserError
from llm_jax.extras import MissingPackage, need
from qyolop_jax import export, integer, quantize
from qyolop_jax.scenes import scene

EXACT = 1e-3
"""Share of 8-bit outputs that onnxruntime may round differently."""
CLOSE = dict(float32=40.0, int8=30.0)
"""Least signal-to-noise ratio in dB if floats are added in another order."""


class DeployError(UserError):
    """A model that cannot be quantized, found or exported; the message says what to do."""


def integer_model(path: Path) -> integer.IntegerModel:
    """The integer model in a file of `train` or `quantize`. DeployError if there is none."""
    if not path.is_file():
        raise DeployError(
            f"there is no integer model {path}; `train` writes one after its last stage, "
            "`quantize --run` makes one of a float model"
        )
    try:
        return integer.load_integer_model(path)
    except integer.IntegerError as error:
        raise DeployError(f"{error}; or make it again with `quantize --run`") from error


def check_export(
    path: Path,
    form: str,
    precision: str,
    forward: Callable[[jax.Array], dict[str, jax.Array]],
    size: tuple[int, int],
    steps: dict[str, np.ndarray],
    mixed: bool,
) -> str:
    """Runs an exported file on two scenes and says how it compares. DeployError if it differs.

    `steps` are the sizes of a step of 8-bit outputs; `mixed` says that some convolutions add
    floats, so that equal bits cannot be expected.
    """
    images = pictures(2, size)
    want = {n: np.asarray(a) for n, a in jax.jit(forward)(jnp.asarray(images)).items()}
    alike = lambda found, by: _compared(want, found, by, precision, steps, mixed)
    if form == "stablehlo":
        return alike(export.deserialize(path.read_bytes())(jnp.asarray(images)), "jax.export")
    try:
        found = onnx_session(path.read_bytes())(images)
    except MissingPackage as error:
        return f"Not run: {error}"
    try:
        return alike(found, "onnxruntime")
    except DeployError:
        if precision == "float32":
            raise
        said = alike(onnx_session(path.read_bytes(), precise=True)(images), "onnxruntime")
        return f"{said}, but only with session.x64quantprecision=1: this processor has no VNNI"


def _compared(want: dict, found: dict, by: str, precision: str, steps: dict, mixed: bool) -> str:
    if set(found) != set(want):
        raise DeployError(f"{by} gives {sorted(found)}; expected {sorted(want)}")
    said = {}
    for name, a in want.items():
        off, ratio = np.abs(np.asarray(found[name]) - a), quantize.sqnr(a, found[name])
        if mixed:
            bad, how = ratio < CLOSE[precision], f"{ratio:.1f} dB signal to noise"
        else:
            other = (off > 0.01 * steps[name]).mean()
            bad = other > (EXACT if by == "onnxruntime" else 0)
            how = f"{other:.2%} of its values differ"
        if bad:
            raise DeployError(
                f"{by} computes {name} otherwise than the model: {how}, by up to {off.max():.3g}; "
                "nothing was written"
            )
        said[name] = float(off.max())
    worst = max(said.values())
    if not worst:
        return f"Checked: {by} gives the model's own bits on 2 scenes"
    each = ", ".join(f"{name} {off:.3g}" for name, off in said.items())
    return f"Checked: {by} on 2 scenes, largest difference {worst:.3g} ({each})"


def pictures(count: int, size: tuple[int, int]) -> np.ndarray:
    """Generated scenes, uint8 [count, H, W, 3]."""
    H, W = size
    return np.stack([scene(i, (max(H, 64), max(W, 64))).image[:H, :W] for i in range(count)])


def onnx_session(data: bytes, precise: bool = False) -> Callable[[Any], dict[str, np.ndarray]]:
    """A function of uint8 images [B, H, W, 3] to {output: array}, by onnxruntime on the CPU.

    `precise` is for processors without VNNI: there onnxruntime otherwise cuts off sums of products
    at 16 bits. It is slower on every processor. MissingPackage without onnxruntime.
    """
    onnxruntime = need("onnxruntime", "vision", "running ONNX")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1" if precise else "0")
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(names, {"images": images}), strict=True))
