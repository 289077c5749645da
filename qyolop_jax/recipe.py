"""From labelled samples to a trained network: the four stages of Q-YOLOP, ready to run.

    network = train(Scenes(256, (160, 256)), folder="run")

Pretrain, pretrain with mosaic, finetune on all data, train in simulated eight bits (the paper's
stages, arXiv 2307.04537). The result is a network in integers.
"""

import contextlib
import dataclasses
import functools
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.extras import need
from qyolop_jax.augment import AugmentConfig
from qyolop_jax.config import ModelConfig
from qyolop_jax.fold import fold
from qyolop_jax.graph import Graph
from qyolop_jax.integer import run_integer, to_integer
from qyolop_jax.losses import LossConfig
from qyolop_jax.model import initial
from qyolop_jax.network import (
    INTEGER_FILE,
    MODEL_FILE,
    Network,
    eight_bit_forward,
    float_forward,
)
from qyolop_jax.optimization import OPTIMIZATION, Optimization
from qyolop_jax.quantize import calibrate_scales
from qyolop_jax.samples import Report, Sample
from qyolop_jax.scales import DEFAULT, Scales, Settings
from qyolop_jax.sources import Cached, Feed, batches, per_epoch
from qyolop_jax.stages import Loss, Phase, Stage, TrainError, Variables
from qyolop_jax.training import fit, float_loss, qat_loss

SMALL = ModelConfig(0.25, "relu", size=(160, 256))
"""A network that learns generated scenes in minutes."""
LOSS = LossConfig(box="ciou", detection=(0.5, 1.0, 1.0), lane_tversky=(0.3, 0.7))
"""Not the paper's: CIoU with a weight of 1, and missed lines cost more than invented ones."""
AUGMENT = AugmentConfig(mosaic=1.0)
"""The probability of mosaic holds in the stages that have mosaic."""
EPOCHS = (7, 3, 7, 1)
CALIBRATION_BATCHES, CALIBRATION_BATCH = 8, 8
"""The ranges of eight bits come from this many batches of this many images."""
THREADS = min(os.cpu_count() or 1, 8)


def four_stages(
    epochs: Sequence[float] = EPOCHS,
    batch: int = 4,
    rate: float = 2e-3,
    data: tuple[str, ...] = (),
    first: tuple[str, ...] = (),
    shares: tuple[float, ...] = (),
) -> list[Stage]:
    """Pretrain, mosaic, finetune, qat: the epochs of each, one batch size, falling rates.

    `rate` is that of the first stage; the others have a half, a quarter and a fiftieth of it.
    The first two stages use the data sets `first`, the last two `data` with `shares`; empty means
    all data sets, in proportion to their sizes.
    """
    if len(epochs) != 4:
        raise TrainError(f"epochs are {tuple(epochs)}; expected four numbers")
    one, two, three, four = epochs
    return [
        Stage("pretrain", one, batch, rate, rate / 20, warmup=min(1, one / 4), data=first),
        Stage("mosaic", two, batch, rate / 2, rate / 40, mosaic=True, data=first),
        Stage("finetune", three, batch, rate / 4, rate / 400, mosaic=True, calm=three / 2,
              data=data, shares=shares),
        Stage("qat", four, batch, rate / 50, rate / 5000, data=data, shares=shares, kind="qat"),
    ]  # fmt: skip


class Training:
    """A run of training: data, stages and settings, and the folder where its state is kept.

    `data` are sequences of samples by name; they are kept in memory, shrunk to what the largest
    warp needs. `dtype` None is bfloat16 on a GPU, else float32. Every batch is split among
    `devices`; None: as many visible ones as divide it. `validate(stage, network)` is
    called at the end of every stage; the dict that it returns goes into the log.
    """

    def __init__(
        self,
        folder: str | Path,
        data: Mapping[str, Sequence[Sample]],
        cfg: ModelConfig = SMALL,
        stages: Sequence[Stage] | None = None,
        *,
        loss: LossConfig = LOSS,
        augment: AugmentConfig = AUGMENT,
        optimization: Optimization = OPTIMIZATION,
        dtype: Any = None,
        seed: int = 0,
        devices: int | None = None,
        validate: Callable[[Stage, Network], dict] | None = None,
        report: Report | None = None,
    ):
        need("cv2", "vision", "training a network").setNumThreads(1)  # threads are over samples
        if dtype is None:
            dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
        self.folder, self.cfg, self.dtype, self.seed = Path(folder), cfg, jnp.dtype(dtype), seed
        self.stages = four_stages() if stages is None else list(stages)
        self.loss, self.augment, self.optimization = loss, augment, optimization
        self.devices = devices
        self.validate, self.report = validate, Report() if report is None else report
        enough = math.ceil(max(cfg.size) * (1 + augment.scale))  # no warp enlarges more
        self.data = {name: Cached(samples, enough) for name, samples in data.items()}
        if not self.stages:
            raise TrainError("no stage to train; expected at least one")
        for stage in self.stages:
            if unknown := [name for name in stage.data if name not in self.data]:
                raise TrainError(
                    f"stage {stage.name} uses {', '.join(unknown)}; there are "
                    f"{', '.join(self.data)}"
                )

    @functools.cached_property
    def phases(self) -> list[Phase]:
        """The stages, ready to run."""
        return [self._phase(at, stage) for at, stage in enumerate(self.stages)]

    @functools.cached_property
    def graph(self) -> Graph:
        """The folded graph, which the stages in eight bits train."""
        return fold(self.cfg, initial(self.cfg))[0]

    @property
    def identity(self) -> str:
        """The settings as text; a folder that holds a run of other settings is refused."""
        sizes = {name: len(samples) for name, samples in self.data.items()}
        parts = self.cfg, self.stages, self.loss, self.augment, self.optimization
        return repr((*parts, str(self.dtype), self.seed, sizes))

    def run(
        self,
        save_every: int = 200,
        identity: str | None = None,
        progress: Callable[[int, int, int, dict], None] | None = None,
    ) -> Variables:
        """The averaged variables at the end; continues a run that `folder` holds. See `fit`.

        The float network is written to model.safetensors at the end of the last float stage.
        """
        return fit(
            self.folder, self.phases, self.optimization, save_every, progress=progress,
            identity=self.identity if identity is None else identity, devices=self.devices,
        )  # fmt: skip

    def network(self, variables: Variables) -> Network:
        """The network that `run` trained: in integers, written to the folder, after eight bits."""
        if self.stages[-1].kind == "float":
            return Network(self.cfg, float_forward(self.cfg), variables)
        model = to_integer(self.graph, variables["params"], variables["scales"], config=self.cfg)
        network = Network(self.cfg, run_integer, model)
        network.save(self.folder / INTEGER_FILE)
        return network

    def calibrated(self, graph: Graph, params: Any, settings: Settings = DEFAULT) -> Scales:
        """The scales of a folded graph, from a few batches of the training data."""
        feed = Feed(self.cfg.size, CALIBRATION_BATCH, seed=self.seed)
        stream = batches(self.data, feed, report=self.report)
        few = [next(stream) for _ in range(CALIBRATION_BATCHES)]
        return calibrate_scales(graph, params, few, settings)

    def _phase(self, at: int, stage: Stage) -> Phase:
        used = {name: self.data[name] for name in stage.data or self.data}
        shares = dict(zip(used, stage.shares, strict=True)) if stage.shares else None

        def stream(mosaic: bool):
            augment = self.augment if mosaic else dataclasses.replace(self.augment, mosaic=0.0)
            seed = 1000 * self.seed + 10 * at + mosaic
            feed = Feed(self.cfg.size, stage.batch, augment, seed, threads=THREADS)
            return batches(used, feed, shares, report=self.report)

        begin = self._begin if stage.kind == "float" else self._begin_eight_bits
        steps = per_epoch(used, stage.batch, shares)
        return Phase(stage, self._loss(stage), begin, stream, steps, self._at_end(at, stage))

    def _loss(self, stage: Stage) -> Loss:
        if stage.kind == "float":
            return float_loss(self.cfg, self.loss, self.dtype)
        return qat_loss(self.graph, self.cfg, self.loss, DEFAULT)

    def _begin(self, variables: Variables | None) -> Variables:
        return initial(self.cfg, self.seed) if variables is None else variables

    def _begin_eight_bits(self, variables: Variables | None) -> Variables:
        if variables is not None and "scales" in variables:
            return variables
        graph, params = fold(self.cfg, self._begin(variables))
        return dict(params=params, scales=self.calibrated(graph, params))

    def _at_end(self, at: int, stage: Stage) -> Callable[[Variables, int, bool], dict]:
        """What is done after an epoch: after a stage's last one, writing and validation."""
        floats = [n for n, s in enumerate(self.stages) if s.kind == "float"]

        def validate(variables: Variables, step: int, last: bool) -> dict:
            if not last:
                return {}
            variables = jax.device_get(variables)
            forward = float_forward(self.cfg)
            if stage.kind == "qat":
                forward = eight_bit_forward(self.graph, DEFAULT)
            network = Network(self.cfg, forward, variables)
            if floats and at == floats[-1]:
                network.save(self.folder / MODEL_FILE)
            return self.validate(stage, network) if self.validate else {}

        return validate


def train(
    data: Sequence[Sample] | Mapping[str, Sequence[Sample]],
    cfg: ModelConfig = SMALL,
    stages: Sequence[Stage] | None = None,
    *,
    folder: str | Path | None = None,
    loss: LossConfig = LOSS,
    augment: AugmentConfig = AUGMENT,
    optimization: Optimization = OPTIMIZATION,
    dtype: Any = None,
    seed: int = 0,
    devices: int | None = None,
    save_every: int = 200,
    validate: Callable[[Stage, Network], dict] | None = None,
    progress: Callable[[int, int, int, dict], None] | None = None,
) -> Network:
    """The network that learned from labelled samples, in `stages` (default: `four_stages()`).

    `data` is one data set or several by name, see `samples.Sample` and `readers`. `folder` keeps
    checkpoints, log and networks, and the same call continues a run that was killed; without it
    they are gone at the end. The other arguments are those of `Training` and of `fit`.
    """
    named = data if isinstance(data, Mapping) else {"data": data}
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="qyolop-"))
        training = Training(
            folder, named, cfg, stages, loss=loss, augment=augment, optimization=optimization,
            dtype=dtype, seed=seed, devices=devices, validate=validate,
        )  # fmt: skip
        return training.network(training.run(save_every, progress=progress))
