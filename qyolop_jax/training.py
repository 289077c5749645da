"""Training in phases: what the losses are, and a loop that survives a kill.

A run is a folder: `checkpoints` (the two newest states) and `log.jsonl`. `fit` continues at the
newest checkpoint, with the batches that would have come next, so a killed run ends in the same
numbers. Letters: B batch.
"""

import contextlib
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from llm_jax.files import LockedError, locked
from qyolop_jax.arrays import not_finite
from qyolop_jax.checkpoints import Checkpoints, TrainingLog
from qyolop_jax.config import ModelConfig
from qyolop_jax.graph import Graph
from qyolop_jax.losses import LossConfig, total_loss
from qyolop_jax.model import Panoptic
from qyolop_jax.optimization import (
    OPTIMIZATION,
    Optimization,
    TrainState,
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
    devices: int | None = None,
) -> Variables:
    """The averaged variables at the end of the last phase; continues the run in `folder`.

    A state is saved at the start, every `save_every` steps and at the end of every phase, with the
    place in the stream of batches; no state is saved that is not finite. An interrupt (SIGINT) ends
    the step, saves, and raises KeyboardInterrupt; a second one raises it at once. `identity`
    describes the settings; a folder with other settings is refused (TrainError), and so is a loss
    that is not finite. `progress(phase, step, steps, parts)` is called after every step; `parts` is
    empty except every `log_every` steps. Batches are split among `devices`, see
    `optimization.devices_for`; a run may be continued on another number of them.
    """
    if save_every < 1 or log_every < 1:
        raise TrainError(
            f"save_every is {save_every}, log_every {log_every}; expected 1 step or more"
        )
    meshes = [devices_for(phase.stage.batch, devices) for phase in phases]
    folder = Path(folder)
    log, checkpoints = TrainingLog(folder / "log.jsonl"), Checkpoints(folder / "checkpoints")
    with _locked(folder), interrupts_held() as interrupted:
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
            mesh = meshes[n]
            resumed = about is not None and n == about["phase"]
            variables = phase.begin(None if resumed else variables)
            state = placed(new_state(variables, optimizer(config)), mesh)
            at = 0
            if resumed:
                state, at = checkpoints.restore(state), about["step"]
            check_state(state, f"the state before step {at + 1} of {phase.stage.name}")
            mosaic = at < phase.calm_from
            batches = phase.batches(mosaic)
            if resumed and about["stream"] is not None:
                batches.set_state(about["stream"])
            if about is None and n == 0:  # a folder that cannot be written is named now
                checkpoints.save(
                    0, state, dict(phase=0, step=0, identity=identity, stream=batches.get_state())
                )
            step = make_step(phase.loss, config, mesh)
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
                stop = interrupted()
                judged = phase.validate is not None and (at % per == 0 or at == phase.steps)
                saved = stop or at % save_every == 0 or at == phase.steps
                if shown or judged or saved:
                    where = f"step {at} of {phase.stage.name} (rate {phase.stage.rate})"
                    check_state(state, where, float(parts["loss"]))
                if judged:
                    averaged = unpacked(state["average"])
                    found = phase.validate(averaged, at, at == phase.steps)
                    if found:
                        log(stage=n, name=phase.stage.name, step=at, validation=found)
                    began, since = time.perf_counter(), at
                if progress:
                    progress(n, at, phase.steps, shown)
                if saved:
                    turn = mosaic and at >= phase.calm_from  # the next stream begins anew
                    place = None if turn else batches.get_state()
                    checkpoints.save(
                        first + at, state, dict(phase=n, step=at, identity=identity, stream=place)
                    )
                if stop:
                    raise KeyboardInterrupt
            if interrupted():  # while the last state was judged or saved
                raise KeyboardInterrupt
            variables = unpacked(jax.device_get(state["average"]))
    return variables


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder for this run alone, which is made if needed. TrainError where it is not."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except (LockedError, OSError) as error:
            raise TrainError(f"{folder} cannot be trained in: {error}") from error
        yield


_finite = jax.jit(
    lambda state: jnp.all(jnp.stack([
        jnp.isfinite(a).all() for a in jax.tree.leaves(state)
        if jnp.issubdtype(a.dtype, jnp.floating)
    ]))
)  # fmt: skip


def check_state(state: TrainState, where: str, loss: float = 0.0) -> None:
    """TrainError, which names the array, where a state or its loss is not finite."""
    if np.isfinite(loss) and _finite(state):
        return
    name = not_finite(jax.device_get(unpacked(state["variables"]))) or "the optimizer's state"
    what = f"{name} holds NaN or infinity" if np.isfinite(loss) else f"the loss is {loss}"
    raise TrainError(
        f"{where}: {what}; the newest checkpoint is from before. Train again in another folder "
        "with a lower rate, or look for wrong samples in the data"
    )


@contextlib.contextmanager
def interrupts_held() -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether SIGINT came since; a second one interrupts at once.

    Python hands signals to the main thread alone; in other threads nothing is held.
    """
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = signal.getsignal(signal.SIGINT) or signal.default_int_handler

    def note(*_: Any) -> None:
        came.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGINT, before)
