"""Trained models run by other programs, and a check that those compute the same."""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
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
CLOSE = dict(float32=40.0, int8=15.0)
"""Least signal-to-noise ratio in dB if floats are added in another order. In 8 bits a sum that is
nearly between two steps is then rounded to the other; layers behind it make more of that."""


Session = Callable[[np.ndarray], dict[str, np.ndarray]]
"""uint8 images [B, H, W, 3] to {output: float32 array}."""


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


@dataclasses.dataclass(frozen=True)
class Expected:
    """What an exported network must compute."""

    forward: Callable[[jax.Array], dict[str, jax.Array]]
    precision: str
    steps: dict[str, np.ndarray]
    """The sizes of a step of 8-bit outputs."""
    mixed: bool
    """Some convolutions add floats, so that equal bits cannot be expected."""


def check_export(
    path: Path, form: str, expected: Expected, size: tuple[int, int], batch: int = 2
) -> str:
    """Runs an exported file on scenes and says how it compares. DeployError if it differs."""
    images = pictures(batch, size)
    raw = jax.jit(expected.forward)(jnp.asarray(images))
    want = {n: np.asarray(a) for n, a in raw.items()}
    alike = lambda found, by: _compared(want, found, by, expected, batch)
    data = path.read_bytes()
    if form == "stablehlo":
        return alike(export.deserialize(data)(jnp.asarray(images)), "jax.export")
    if form == "tflite":
        return alike(litert_session(data)(images), "LiteRT")
    try:
        found = onnx_session(data)(images)
    except MissingPackage as error:
        return f"Not run: {error}"
    try:
        return alike(found, "onnxruntime")
    except DeployError:
        if expected.precision == "float32":
            raise
        said = alike(onnx_session(data, precise=True)(images), "onnxruntime")
        return f"{said}, but only with session.x64quantprecision=1: this processor has no VNNI"


def _compared(want: dict, found: dict, by: str, expected: Expected, batch: int) -> str:
    if set(found) != set(want):
        raise DeployError(f"{by} gives {sorted(found)}; expected {sorted(want)}")
    said = {}
    for name, a in want.items():
        off, ratio = np.abs(np.asarray(found[name]) - a), quantize.sqnr(a, found[name])
        if expected.mixed:
            bad, how = ratio < CLOSE[expected.precision], f"{ratio:.1f} dB signal to noise"
        else:
            other = (off > 0.01 * expected.steps[name]).mean()
            bad = other > (EXACT if by == "onnxruntime" else 0)
            how = f"{other:.2%} of its values differ"
        if bad:
            raise DeployError(
                f"{by} computes {name} otherwise than the model: {how}, by up to {off.max():.3g}; "
                "nothing was written"
            )
        said[name] = float(off.max())
    worst, scenes = max(said.values()), "1 scene" if batch == 1 else f"{batch} scenes"
    if not worst:
        return f"Checked: {by} gives the model's own bits on {scenes}"
    each = ", ".join(f"{name} {off:.3g}" for name, off in said.items())
    return f"Checked: {by} on {scenes}, largest difference {worst:.3g} ({each})"


def pictures(count: int, size: tuple[int, int]) -> np.ndarray:
    """Generated scenes, uint8 [count, H, W, 3]."""
    H, W = size
    return np.stack([scene(i, (max(H, 64), max(W, 64))).image[:H, :W] for i in range(count)])


def onnx_session(data: bytes, precise: bool = False, threads: int | None = None) -> Session:
    """A network in ONNX, run by onnxruntime on the CPU.

    `precise` is for processors without VNNI: there onnxruntime otherwise cuts off sums of products
    at 16 bits. It is slower on every processor. MissingPackage without onnxruntime.
    """
    onnxruntime = need("onnxruntime", "vision", "running ONNX")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.x64quantprecision", "1" if precise else "0")
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(names, {"images": images}), strict=True))


def openvino_session(
    data: bytes, precision: str = "float32", threads: int | None = None
) -> Session:
    """A network in ONNX, run by OpenVINO on the CPU. MissingPackage without openvino.

    `precision` is that of what is not in 8 bits: float32 or bfloat16.
    """
    core = _openvino().Core()
    settings = dict(INFERENCE_PRECISION_HINT=dict(float32="f32", bfloat16="bf16")[precision])
    if threads:
        settings["INFERENCE_NUM_THREADS"] = str(threads)
    made = core.compile_model(core.read_model(data), "CPU", settings)
    names = [o.get_any_name() for o in made.outputs]

    def run(images):
        found = made(images)
        return {name: found[name] for name in names}

    return run


def openvino_has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this processor."""
    return "BF16" in _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _openvino() -> ModuleType:
    """The package; without the one that forks a process to report each import to its makers."""
    modules: dict[str, Any] = sys.modules
    modules.setdefault("openvino_telemetry", None)
    return need("openvino", "openvino", "--engines openvino")


def litert_session(data: bytes, threads: int | None = None) -> Session:
    """A .tflite file, run on the CPU by LiteRT (XNNPACK). MissingPackage without ai-edge-litert."""
    litert = need("ai_edge_litert.interpreter", "litert", "running .tflite")
    runner = litert.Interpreter(model_content=data, num_threads=threads or os.cpu_count())
    at = runner.get_input_details()[0]["index"]
    outputs = {o["name"]: o["index"] for o in runner.get_output_details()}
    shape = None

    def run(images):
        nonlocal shape
        if images.shape != shape:
            shape = images.shape
            runner.resize_tensor_input(at, shape)
            runner.allocate_tensors()
        runner.set_tensor(at, images)
        runner.invoke()
        return {name: runner.get_tensor(index) for name, index in outputs.items()}

    return run
