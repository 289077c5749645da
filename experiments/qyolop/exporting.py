"""Trained models for other programs: as ONNX, as .tflite, as StableHLO."""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console

from experiments.qyolop.engines import DeployError, Expected, check_export, integer_model
from experiments.qyolop.flags import LARGEST_BATCH, FlagError, check_file, check_range, flag
from llm_jax.files import atomic_file
from qyolop_jax import export, forms, integer, qdq, tflite
from qyolop_jax.config import ModelConfig
from qyolop_jax.fold import fold, run_folded
from qyolop_jax.network import INTEGER_FILE, MODEL_FILE
from qyolop_jax.weights import load_weights

ENDS = dict(onnx=".onnx", qdq="-qdq.onnx", tflite=".tflite", stablehlo=".stablehlo")
"""How the file of each format ends, behind the model's name."""
FORMATS = dict(opset=("onnx", "qdq"), batch=("onnx", "qdq", "tflite"), symmetric=("qdq",))
"""The formats that a flag is for."""


@dataclasses.dataclass(frozen=True)
class Export:
    """A model for other programs; it runs there once, to check that it computes the same."""

    run: Path
    """Folder of `train`, or a file of `train` or `quantize`."""
    format: Literal["onnx", "qdq", "tflite", "stablehlo"]
    """onnx: integers for onnxruntime. qdq: ONNX whose pairs of QuantizeLinear and DequantizeLinear
    OpenVINO, TensorRT and onnxruntime turn into integers. tflite: for LiteRT, on phones too.
    stablehlo is what jax.export reads."""
    precision: Literal["int8", "float32"] = "int8"
    symmetric: bool = False
    """qdq as TensorRT wants it: s8 tensors with zero points 0, which costs some accuracy in a
    network that was not quantized so, and biases in float. Only for relu."""
    opset: int | None = None
    """Opset of ONNX, 13 to 27; default: 17."""
    batch: int | None = None
    """A fixed number of images; default: any (in .tflite 1, which LiteRT can resize)."""
    size: tuple[int, int] | None = None
    """Height and width, multiples of 32; default: those of the training."""
    output: Path | None = None


def export_command(args: Export, console: Console) -> int:
    """Writes the file and runs it once; nothing is written where it differs from the model."""
    _check(args)
    path, size = args.run.expanduser(), args.size
    if args.precision == "int8":
        path = path / INTEGER_FILE if path.is_dir() else path
        model = integer_model(path)
        size = size or _size_of(model, path)
        write, expected = _integer_writer(args, model, size)
    else:
        path = path / MODEL_FILE if path.is_dir() else path
        cfg, variables = load_weights(path)
        graph, params = fold(cfg, variables)
        size, opset = size or cfg.size, args.opset or export.OPSET
        forward = lambda images: run_folded(graph, params, images)
        write = dict(
            onnx=lambda: _bytes(export.float_onnx(graph, params, size, opset, args.batch)),
            tflite=lambda: tflite.float_tflite(graph, params, size, args.batch or 1),
            stablehlo=lambda: export.serialize(forward, size),
        )[args.format]
        expected = Expected(forward, "float32", {}, mixed=True)
    stem = path.stem if args.precision == "int8" else f"{path.stem}-float32"
    target = args.output or path.parent / (stem + ENDS[args.format])
    check_file(target, path)
    with console.status(f"Exporting {path}"), atomic_file(target) as scratch:
        scratch.write_bytes(write())
        said = check_export(scratch, args.format, expected, size, args.batch or 2)
    batch = "any batch" if args.batch is None else f"a batch of {args.batch}"
    console.print(
        f"Written: {target}, {target.stat().st_size / 1e6:.2f} MB, {batch} of {size[0]}x{size[1]}"
        f"\n{said}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0


def _check(args: Export) -> None:
    """FlagError for flags that do not go together, ModelConfigError for a size that cannot be."""
    for name, formats in FORMATS.items():
        if getattr(args, name) and args.format not in formats:
            raise FlagError(f"{flag(name)} is for --format {' or '.join(formats)}")
    if args.format == "qdq" and args.precision != "int8":
        raise FlagError("--format qdq is for --precision int8; take --format onnx")
    if args.opset is not None:
        check_range(args, *export.OPSETS, "opset")
    if args.batch is not None:
        check_range(args, 1, LARGEST_BATCH, "batch")
    if args.size is not None:
        ModelConfig(size=args.size)


def _size_of(model: integer.IntegerModel, path: Path) -> tuple[int, int]:
    """The size of the training, from the file or from the float network beside it."""
    if model.config is not None:
        return model.config.size
    beside = path.parent / MODEL_FILE
    if not beside.is_file():
        raise DeployError(
            f"{path} does not say its size, and {beside} is not there; give --size HEIGHT WIDTH"
        )
    return load_weights(beside)[0].size


def _integer_writer(args: Export, model: integer.IntegerModel, size: tuple[int, int]):
    """What writes an integer model in the format that is asked for, and what it must compute."""
    opset = args.opset or export.OPSET
    same = forms.symmetric(model) if args.symmetric else model
    forward = lambda images: integer.run_integer(same, images)
    write = dict(
        onnx=lambda: _bytes(export.integer_onnx(model, size, opset, args.batch)),
        qdq=lambda: _bytes(qdq.qdq_onnx(model, size, args.symmetric, opset, args.batch)),
        tflite=lambda: tflite.integer_tflite(model, size, args.batch or 1),
        stablehlo=lambda: export.serialize(forward, size),
    )[args.format]
    steps = {n: np.asarray(p["step"]) for n, p in same.outputs.items()}
    mixed = any("factor" not in layer for layer in same.layers.values())
    if args.format == "qdq":  # a relu that rounding does not do keeps onnxruntime from integers
        mixed |= any(int(layer["low"]) > -128 for layer in same.layers.values() if "low" in layer)
    return write, Expected(forward, "int8", steps, mixed)


def _bytes(model) -> bytes:
    return model.SerializeToString()
