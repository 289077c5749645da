"""Training in stages: what a step does, what survives a kill, and what is kept of it.

A run is a folder: `checkpoints` (orbax, the two newest), `log.jsonl`, panels. `fit` continues where
the newest checkpoint stands, with the batches that would have come next, so that a run that was
killed ends in the same numbers. Letters: B batch.
"""

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qyolop_jax import QyolopError
from qyolop_jax.flat import pack

State = dict[str, Any]
Batch = dict[str, Any]


class TrainError(QyolopError):
    """A run that cannot be started or continued; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One of the stages of a run; the paper's four are `experiments.qyolop`'s default."""

    name: str
    epochs: float
    batch: int
    rate: float
    """Learning rate after the warm-up; it falls to `last_rate` along a cosine."""
    last_rate: float
    warmup: float = 0.0
    """Epochs over which the rate rises from nothing."""
    mosaic: bool = False
    calm: float = 0.0
    """Last epochs without mosaic."""
    augment: bool = True
    data: tuple[str, ...] = ()
    """Data sets by name."""
    shares: tuple[float, ...] = ()
    """Of each of them in the mixture; by their sizes if empty."""
    kind: Literal["float", "qat"] = "float"

    def __post_init__(self):
        if self.epochs <= 0 or self.batch < 1 or not 0 <= self.warmup < self.epochs:
            raise TrainError(
                f"stage {self.name}: epochs {self.epochs}, batch {self.batch}, warm-up "
                f"{self.warmup}; expected epochs above the warm-up and a batch of 1 or more"
            )
        if self.shares and len(self.shares) != len(self.data):
            raise TrainError(
                f"stage {self.name}: {len(self.shares)} shares; expected one for each of "
                f"{', '.join(self.data)}"
            )
        if not 0 <= self.last_rate <= self.rate:
            raise TrainError(
                f"stage {self.name}: the rate goes from {self.rate} to {self.last_rate}; expected "
                "it to fall"
            )


@dataclasses.dataclass(frozen=True)
class Optimization:
    """What all stages share: Adam, weight decay on kernels alone, gradients clipped by norm."""

    momentum: float = 0.937
    decay: float = 5e-4
    clip: float = 10.0
    average: float = 0.999
    """Decay of the moving average of the weights, which is what gets evaluated; reached slowly."""


Loss = Callable[[State, Batch], tuple[jax.Array, tuple[State, dict]]]
"""(variables, batch) -> (scalar, (changed variables beside "params", parts for the log)). Variables
are a dict of pytrees, of which "params" has gradients."""


class Batches(Protocol):
    """An endless stream of batches that can be put back where it was (as grain's iterators can)."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> Any:
        """Something that `json` can write."""

    def set_state(self, state: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stage made ready: its loss, its first variables from the last stage's, its batches."""

    stage: Stage
    loss: Loss
    begin: Callable[[State | None], State]
    batches: Callable[[bool], Batches]
    """By whether mosaic is on."""
    per_epoch: int
    """Steps."""
    validate: Callable[[State, int, bool], dict] | None = None
    """(averaged variables, step, whether it is the last) -> what to log; after every epoch."""

    @property
    def steps(self) -> int:
        return max(1, round(self.stage.epochs * self.per_epoch))

    @property
    def calm_from(self) -> int:
        """The step from which mosaic is off."""
        if not self.stage.mosaic:
            return 0
        return max(0, self.steps - round(self.stage.calm * self.per_epoch))


@functools.cache
def float_loss(cfg, loss_cfg, dtype=jnp.float32) -> Loss:
    """Training of the network as it is, with batch statistics."""
    from qyolop_jax.losses import total_loss
    from qyolop_jax.model import Panoptic

    model = Panoptic(cfg, dtype)

    def loss(variables, batch):
        raw, changed = model.apply(variables, batch["image"], train=True, mutable=["batch_stats"])
        total, parts = total_loss(raw, batch, cfg, loss_cfg)
        return total, (dict(changed), parts)

    return loss


@functools.cache
def qat_loss(graph, cfg, loss_cfg, settings) -> Loss:
    """Training of a folded graph as eight bits see it; "scales" follow what the batches show.

    Variables are "params" of `fold.fold` and "scales" of `quantize.calibrate`.
    """
    from qyolop_jax.losses import total_loss
    from qyolop_jax.quantize import follow, qat_forward

    def loss(variables, batch):
        raw, seen = qat_forward(
            graph, variables["params"], variables["scales"], batch["image"], settings
        )
        total, parts = total_loss(raw, batch, cfg, loss_cfg)
        return total, (dict(scales=follow(variables["scales"], seen, 0.99)), parts)

    return loss


def rates(stage: Stage, steps: int, per_epoch: int):
    """The learning rate of a stage of `steps` steps, as a function of the step."""
    warmup = round(stage.warmup * per_epoch)
    if warmup:
        return optax.warmup_cosine_decay_schedule(
            0.0, stage.rate, warmup, max(steps, warmup + 1), stage.last_rate
        )
    return optax.cosine_decay_schedule(stage.rate, steps, stage.last_rate / max(stage.rate, 1e-30))


@functools.cache
def optimizer(config: Optimization):
    """The optax transformation of `Packed` parameters at a rate of 1, the same for all stages."""

    def decay(updates, params):
        at = jax.lax.iota(jnp.int32, params.vector.size)
        kernels = jnp.where(at < params.layout.kernels, params.vector, 0)
        return dataclasses.replace(updates, vector=updates.vector + config.decay * kernels)

    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(b1=config.momentum),
        optax.stateless(decay),
        optax.scale(-1.0),
    )


def new_state(variables: State, tx) -> State:
    """The state of a stage that begins with these variables; trees are `Packed`."""
    rest = {k: v for k, v in variables.items() if k != "params"}
    now = dict(params=pack(variables["params"]), rest=pack(rest))
    now, average = (jax.tree.map(jnp.array, now) for _ in range(2))  # copies; they get donated
    return dict(
        variables=now,
        average=average,
        optimizer=tx.init(now["params"]),
        step=jnp.zeros((), jnp.int32),
    )


def unpacked(now: dict) -> State:
    """Variables from the "variables" or the "average" of a state."""
    return dict(now["rest"].tree, params=now["params"].tree)


@functools.cache
def make_step(loss: Loss, config: Optimization):
    """One step as a jitted function (state, batch, rate) -> (state, parts); donates the state.

    Stages that share a loss share its program.
    """
    tx = optimizer(config)

    def step(state, batch, rate):
        now = state["variables"]
        rest = now["rest"].tree

        def of_params(params):
            return loss(dict(rest, params=params.tree), batch)

        (total, (changed, parts)), grads = jax.value_and_grad(of_params, has_aux=True)(
            now["params"]
        )
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its own counters with floats
            updates, opt = tx.update(grads, state["optimizer"], now["params"])
        moved = now["params"].vector + updates.vector * rate
        new = dict(
            params=dataclasses.replace(now["params"], vector=moved), rest=pack(rest | changed)
        )
        count = state["step"] + 1
        keep = jnp.minimum(config.average, (1 + count) / (10 + count)).astype(jnp.float32)
        average = {
            k: dataclasses.replace(
                p, vector=state["average"][k].vector * keep + p.vector * (1 - keep)
            )
            for k, p in new.items()
        }
        parts = dict(parts, loss=total, gradient=jnp.linalg.norm(grads.vector))
        return dict(variables=new, average=average, optimizer=opt, step=count), parts

    return jax.jit(step, donate_argnums=0)


def devices_for(batch: int) -> Mesh:
    """A mesh over all visible devices; TrainError if the batch cannot be split among them."""
    devices = jax.devices()
    if batch % len(devices):
        raise TrainError(
            f"a batch of {batch} cannot be split among {len(devices)} devices; take a multiple, or "
            "hide some (CUDA_VISIBLE_DEVICES)"
        )
    return Mesh(np.asarray(devices), ("data",))


def placed(tree, mesh: Mesh, split: bool = False):
    """The arrays on the mesh: batches split along their first axis, all else on every device."""
    spec = PartitionSpec("data") if split else PartitionSpec()
    return jax.device_put(tree, NamedSharding(mesh, spec))


class Log:
    """JSON lines, each written whole; what a killed run wrote behind its checkpoint is dropped."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, **record) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def rewind(self, stage: int, step: int) -> None:
        if not self.path.exists():
            return
        lines = []
        for line in self.path.read_text().splitlines():
            try:
                r = json.loads(line)
            except json.JSONDecodeError:  # cut off by the kill
                continue
            if (r["stage"], r["step"]) <= (stage, step):
                lines.append(line + "\n")
        scratch = self.path.with_suffix(f".{os.getpid()}")
        scratch.write_text("".join(lines))
        scratch.replace(self.path)


class Checkpoints:
    """States on disk, through orbax: whole ones only, the two newest."""

    def __init__(self, folder: Path):
        import orbax.checkpoint as ocp

        self.ocp = ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    def newest(self) -> dict | None:
        """The description that was saved with the newest state; None where there is none."""
        at = self.manager.latest_step()
        if at is None:
            return None
        found = self.manager.restore(
            at, args=self.ocp.args.Composite(about=self.ocp.args.JsonRestore())
        )
        return found["about"]

    def restore(self, like: State) -> State:
        at = self.manager.latest_step()
        like = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like
        )
        args = self.ocp.args.Composite(state=self.ocp.args.StandardRestore(like))
        return self.manager.restore(at, args=args)["state"]

    def save(self, at: int, state: State, about: dict) -> None:
        args = self.ocp.args
        self.manager.save(
            at, args=args.Composite(state=args.StandardSave(state), about=args.JsonSave(about))
        )
        self.manager.wait_until_finished()

    def close(self) -> None:
        self.manager.close()


def fit(
    folder: Path,
    phases: Sequence[Phase],
    config: Optimization = Optimization(),
    save_every: int = 500,
    log_every: int = 20,
    identity: str = "",
    progress: Callable[[int, int, int, dict], None] | None = None,
) -> State:
    """The averaged variables behind the last phase; continues what is in `folder`.

    A state is saved every `save_every` steps and at every phase's end, with the place in the stream
    of batches. `identity` describes the settings; a folder of other settings is refused.
    `progress(phase, step, steps, parts)` is called after every step, with parts when they are read.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    log, checkpoints = Log(folder / "log.jsonl"), Checkpoints(folder / "checkpoints")
    about = checkpoints.newest()
    if about is not None and about["identity"] != identity:
        raise TrainError(
            f"{folder} holds a run with other settings; take another folder, or remove it"
        )
    log.rewind(*((-1, 0) if about is None else (about["phase"], about["step"])))
    total, variables = 0, None
    for n, phase in enumerate(phases):
        per = phase.per_epoch
        rate = rates(phase.stage, phase.steps, per)
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
