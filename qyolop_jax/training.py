"""Training in phases: what the losses are, and a loop that survives a kill.

A run is a folder: `checkpoints` (orbax, the two newest) and `log.jsonl`. `fit` continues at the
newest checkpoint, with the batches that would have come next, so a killed run ends in the same
numbers. Letters: B batch.
"""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from qyolop_jax.checkpoints import Checkpoints, TrainingLog
from qyolop_jax.config import ModelConfig
from qyolop_jax.graph import Graph
from qyolop_jax.losses import LossConfig, total_loss
from qyolop_jax.model import Panoptic
from qyolop_jax.optimization import (
    OPTIMIZATION,
    Optimization,
    devices_for,
    learning_rate,
    make_step,
    new_state,
    optimizer,
    placed,
    unpacked,
)
from qyolop_jax.quantize import follow, qat_forward
from qyolop_jax.scales import Settings
from qyolop_jax.stages import Loss, Phase, TrainError, Variables


@functools.cache
def float_loss(cfg: ModelConfig, loss_cfg: LossConfig, dtype: DTypeLike = jnp.float32) -> Loss:
    """The loss of the network as it is, with batch statistics."""
    model = Panoptic(cfg, dtype)

    def loss(variables, batch):
        raw, changed = model.apply(variables, batch["image"], train=True, mutable=["batch_stats"])
        total, parts = total_loss(raw, batch, cfg, loss_cfg)
        return total, (dict(changed), parts)

    return loss


@functools.cache
def qat_loss(graph: Graph, cfg: ModelConfig, loss_cfg: LossConfig, settings: Settings) -> Loss:
    """The loss of a folded graph in simulated eight bits; "scales" follow what the batches show.

    Variables are "params" of `fold.fold` and "scales" of `quantize.calibrate_scales`.
    """

    def loss(variables, batch):
        raw, seen = qat_forward(
            graph, variables["params"], variables["scales"], batch["image"], settings
        )
        total, parts = total_loss(raw, batch, cfg, loss_cfg)
        return total, (dict(scales=follow(variables["scales"], seen, 0.99)), parts)

    return loss


def fit(
    folder: Path,
    phases: Sequence[Phase],
    config: Optimization = OPTIMIZATION,
    save_every: int = 500,
    log_every: int = 20,
    identity: str = "",
    progress: Callable[[int, int, int, dict], None] | None = None,
) -> Variables:
    """The averaged variables at the end of the last phase; continues the run in `folder`.

    A state is saved every `save_every` steps and at the end of every phase, with the place in the
    stream of batches. `identity` describes the settings; a folder with other settings is refused
    (TrainError), and so is a loss that is not finite. `progress(phase, step, steps, parts)` is
    called after every step; `parts` is empty except every `log_every` steps.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    log, checkpoints = TrainingLog(folder / "log.jsonl"), Checkpoints(folder / "checkpoints")
    about = checkpoints.newest()
    if about is not None and about["identity"] != identity:
        raise TrainError(
            f"{folder} holds a run with other settings; take another folder, or remove it"
        )
    log.rewind(*((-1, 0) if about is None else (about["phase"], about["step"])))
    total, variables = 0, None
    for n, phase in enumerate(phases):
        per = phase.per_epoch
        rate = learning_rate(phase.stage, phase.steps, per)
        first = total
        total += phase.steps
        if about is not None and n < about["phase"]:
            continue
        mesh = devices_for(phase.stage.batch)
        resumed = about is not None and n == about["phase"]
        variables = phase.begin(None if resumed else variables)
        state = placed(new_state(variables, optimizer(config)), mesh)
        at = 0
        if resumed:
            state, at = checkpoints.restore(state), about["step"]
        mosaic = at < phase.calm_from
        batches = phase.batches(mosaic)
        if resumed and about["stream"] is not None:
            batches.set_state(about["stream"])
        step = make_step(phase.loss, config)
        began, since = time.perf_counter(), at
        while at < phase.steps:
            if mosaic and at >= phase.calm_from:
                mosaic, batches = False, phase.batches(False)
            now = jnp.asarray(rate(at), jnp.float32)
            state, parts = step(state, placed(next(batches), mesh, split=True), now)
            at += 1
            shown = {}
            if at % log_every == 0 or at == phase.steps:
                shown = {k: float(v) for k, v in parts.items()}
                seconds = time.perf_counter() - began
                images = (at - since) * phase.stage.batch / seconds
                began, since = time.perf_counter(), at
                log(stage=n, name=phase.stage.name, step=at, rate=float(now),
                    images_per_second=images, **shown)  # fmt: skip
                if not np.isfinite(shown["loss"]):
                    raise TrainError(
                        f"the loss is {shown['loss']} at step {at} of {phase.stage.name}; lower "
                        f"its rate ({phase.stage.rate}); the newest checkpoint is from before"
                    )
            if phase.validate is not None and (at % per == 0 or at == phase.steps):
                averaged = unpacked(state["average"])
                found = phase.validate(averaged, at, at == phase.steps)
                if found:
                    log(stage=n, name=phase.stage.name, step=at, validation=found)
                began, since = time.perf_counter(), at
            if progress:
                progress(n, at, phase.steps, shown)
            if at % save_every == 0 or at == phase.steps:
                turn = mosaic and at >= phase.calm_from  # the next stream begins anew
                checkpoints.save(
                    first + at,
                    state,
                    dict(phase=n, step=at, identity=identity,
                         stream=None if turn else batches.get_state()),
                )  # fmt: skip
        variables = unpacked(jax.device_get(state["average"]))
    checkpoints.close()
    return variables
