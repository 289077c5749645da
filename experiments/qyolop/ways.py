"""What `benchmark` times: a network in every precision and engine, and training steps."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments.qyolop.engines import (
    DeployError,
    integer_model,
    litert_session,
    onnx_session,
    openvino_has_bfloat16,
    openvino_session,
    pictures,
)
from qyolop_jax import export, integer, optimization, qdq, tflite
from qyolop_jax.config import ModelConfig
from qyolop_jax.fold import Folded, fold, run_folded
from qyolop_jax.forms import unrounded
from qyolop_jax.graph import Graph, build_graph, count
from qyolop_jax.losses import LossConfig
from qyolop_jax.model import initial
from qyolop_jax.network import INTEGER_FILE, MODEL_FILE
from qyolop_jax.postprocess import to_predictions
from qyolop_jax.scales import DEFAULT, plan_quantization
from qyolop_jax.scenes import Scenes
from qyolop_jax.sources import Feed, batches
from qyolop_jax.training import float_loss
from qyolop_jax.weights import load_weights

Engine = Literal["jax", "onnxruntime", "openvino", "litert"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
CONF = 0.01
"""Least score of a box when an engine is scored, that of `evaluation.evaluate`."""
TRAINING_MACS = 3
"""Multiply-adds of a training step in those of a forward pass: one forward, two backward."""


@dataclasses.dataclass(frozen=True)
class Way:
    """Something to time: `call()` returns when it is done. `key` goes into its record."""

    key: dict
    call: Callable
    images: int
    macs: int
    """Multiply-adds of one image."""
    limit: str | None = None
    """The matrix product that its rate is compared with."""
    predict: Callable[[Any, np.ndarray], Any] | None = None
    """(None, uint8 images) to `Predictions`, to score it; for the batch of `images` alone."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """The network that is timed."""

    cfg: ModelConfig
    variables: dict | None
    """What training starts from; None where only integers are known."""
    model: integer.IntegerModel | None
    weights: str
    macs: int
    parameters: int
    folded: tuple[Graph, Folded] | None = None
    """The network in float32."""


def subject(
    run: Path | None, random: ModelConfig, size: tuple[int, int] | None, console: Console
) -> Subject:
    """The network in `run`, or `random`; `model` is None if there are no integers beside floats.

    Of a file of integers alone the floats are their own weights, with nothing rounded between them.
    """
    if run is None:
        cfg, variables, weights = random, initial(random), "random"
        graph, params = folded = fold(cfg, variables)
        parts = plan_quantization(graph, DEFAULT).parts
        scales = {n: jnp.asarray([[-4.0, 4.0]] * (int(p.max()) + 1)) for n, p in parts.items()}
        model = integer.to_integer(graph, params, scales)
    elif integer.is_integer(run.expanduser()):
        model, variables = integer_model(run.expanduser()), None
        if model.config is None:
            raise DeployError(f"{run} does not say its classes; make it again by `quantize`")
        cfg, weights = model.config, f"{run}, the same in float32"
        folded = unrounded(model)
    else:
        folder = run.expanduser()
        cfg, variables = load_weights(folder / MODEL_FILE if folder.is_dir() else folder)
        folded = fold(cfg, variables)
        weights, folder = str(run), folder if folder.is_dir() else folder.parent
        try:
            model = integer_model(folder / INTEGER_FILE)
        except DeployError as error:
            console.print(f"int8 is left out: {error}", style="yellow", soft_wrap=True)
            model = None
    cfg = dataclasses.replace(cfg, size=size or cfg.size)
    parameters, macs = count(build_graph(cfg), cfg.size).total()
    return Subject(cfg, variables, model, weights, macs, parameters, folded)


def forwards(
    s: Subject, batch: int, engines: Sequence[Engine], threads: int | None
) -> Iterator[tuple[Engine, str, Callable, tuple]]:
    """Every (engine, precision, function to raw outputs, its arguments) for `batch` images.

    The last argument is the images. MissingPackage for an engine that is not installed.
    """
    size, model, (graph, params) = s.cfg.size, s.model, s.folded
    images = np.resize(pictures(min(batch, 4), size), (batch, *size, 3))
    if "jax" in engines:
        there = jax.device_put(images)
        for dtype in (jnp.float32, jnp.bfloat16):
            cast = jax.tree.map(lambda a, dtype=dtype: jnp.asarray(a, dtype), params)
            run = lambda p, x, dtype=dtype: run_folded(graph, p, x, dtype)
            yield "jax", jnp.dtype(dtype).name, run, (cast, there)
        if model is not None:
            yield "jax", "int8", integer.run_integer, (model, there)
    onnx = lambda: export.float_onnx(graph, params, size, batch=batch).SerializeToString()
    if "onnxruntime" in engines:
        yield "onnxruntime", "float32", onnx_session(onnx(), threads=threads), (images,)
        if model is not None:
            data = export.integer_onnx(model, size, batch=batch).SerializeToString()
            yield "onnxruntime", "int8", onnx_session(data, threads=threads), (images,)
    if "openvino" in engines:
        for precision in ("float32", "bfloat16")[: 1 + openvino_has_bfloat16()]:
            yield "openvino", precision, openvino_session(onnx(), precision, threads), (images,)
        if model is not None:
            data = qdq.qdq_onnx(model, size, batch=batch).SerializeToString()
            yield "openvino", "int8", openvino_session(data, threads=threads), (images,)
    if "litert" in engines:
        data = tflite.float_tflite(graph, params, size, batch)
        yield "litert", "float32", litert_session(data, threads), (images,)
        if model is not None:
            data = tflite.integer_tflite(model, size, batch)
            yield "litert", "int8", litert_session(data, threads), (images,)


def inference(
    s: Subject, batch: int, engines: Sequence[Engine] = ENGINES[:2], threads: int | None = None
) -> Iterator[Way]:
    """The `Way`s for one batch size, each without and with post-processing."""
    on_gpu = jax.default_backend() == "gpu"
    finish = lambda raw, conf: to_predictions(raw, s.cfg, conf)
    for engine, precision, run, arguments in forwards(s, batch, engines, threads):
        held = arguments[:-1]
        if engine == "jax":
            raw = jax.jit(run)
            both = jax.jit(lambda *a, run=run, conf=0.05: finish(run(*a), conf))
            boxed = jax.jit(lambda *a, run=run: finish(run(*a), CONF))
            limit = precision if on_gpu else "float32"
        else:
            raw, after = run, jax.jit(finish, static_argnums=1)
            both = lambda x, run=run, after=after, conf=0.05: after(
                jax.device_put(run(x), cpu()), conf
            )
            boxed = lambda x, both=both: both(x, conf=CONF)
            limit = "cpu float32" if on_gpu else "float32"

        def predict(_, x, boxed=boxed, held=held):
            return jax.tree.map(np.asarray, boxed(*held, x))

        for post, f in ((False, raw), (True, both)):
            call = lambda f=f, arguments=arguments: jax.block_until_ready(f(*arguments))
            key = dict(engine=engine, precision=precision, batch=batch, postprocessing=post)
            scored = None if post else predict
            yield Way(key | dict(task="inference"), call, batch, s.macs, limit, scored)


def cpu() -> jax.Device:
    """The device for other engines' outputs: the CPU, or the accelerator if JAX may use no CPU."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names others
        return jax.devices()[0]


def training(s: Subject, batch: int) -> Iterator[Way]:
    """A `Way` per precision: one optimization step, with the batch already on the device."""
    if s.variables is None:
        raise DeployError("--train-batch needs a float network; --run is one of integers")
    mesh = optimization.devices_for(batch, len(jax.devices()))
    config = optimization.OPTIMIZATION
    stream = batches(dict(scenes=Scenes(min(batch, 16), s.cfg.size)), Feed(s.cfg.size, batch))
    data = optimization.placed(next(stream), mesh, split=True)
    for dtype in (jnp.float32, jnp.bfloat16):
        step = optimization.make_step(float_loss(s.cfg, LossConfig(), dtype), config, mesh)
        state = optimization.new_state(s.variables, optimization.optimizer(config))
        held = [optimization.placed(state, mesh)]  # a step donates it

        def call(step=step, held=held):
            held[0], parts = step(held[0], data, jnp.float32(1e-6))
            jax.block_until_ready((held[0], parts))

        name = jnp.dtype(dtype).name
        limit = name if jax.default_backend() == "gpu" else "float32"
        key = dict(task="training", engine="jax", precision=name, batch=batch)
        yield Way(key, call, batch, TRAINING_MACS * s.macs, limit)
