"""One step of training, on one device or several: Adam, weight decay, clipping, moving average.

Letters: B batch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jax.extras import need
from qyolop_jax.flat import FlatTree, flatten
from qyolop_jax.stages import Loss, Stage, TrainError, Variables

if TYPE_CHECKING:
    import optax
else:
    optax = need("optax", "vision", "training a network")


@dataclasses.dataclass(frozen=True)
class Optimization:
    """What all stages share: Adam, weight decay on kernels alone, gradients clipped by norm."""

    momentum: float = 0.937
    decay: float = 5e-4
    clip: float = 10.0
    average: float = 0.999
    """Decay of the moving average of the weights; it starts lower. The average is evaluated."""

    def __post_init__(self):
        shares = self.momentum, self.decay, self.average
        if not all(0 <= share < 1 for share in shares) or not self.clip > 0:
            raise TrainError(
                f"momentum {self.momentum}, decay {self.decay}, average {self.average}, clip "
                f"{self.clip}; expected the first three from 0 to below 1, and clip above 0"
            )


OPTIMIZATION = Optimization()
TrainState = dict[str, Any]
"""variables and average ({params, rest}, each a `FlatTree`), optimizer, step (int32 scalar)."""


def learning_rate(stage: Stage, steps: int, per_epoch: int) -> Callable[[int], Any]:
    """The learning rate of a stage of `steps` steps, as a function of the step."""
    warmup = round(stage.warmup * per_epoch)
    if warmup:
        return optax.warmup_cosine_decay_schedule(
            0.0, stage.rate, warmup, max(steps, warmup + 1), stage.last_rate
        )
    return optax.cosine_decay_schedule(stage.rate, steps, stage.last_rate / max(stage.rate, 1e-30))


@functools.cache
def optimizer(config: Optimization) -> "optax.GradientTransformation":
    """The optax transformation of `FlatTree` parameters at a rate of 1, for all stages."""

    def decay(updates: Any, params: Any) -> FlatTree:
        at = jax.lax.iota(jnp.int32, params.vector.size)
        kernels = jnp.where(at < params.layout.kernels, params.vector, 0)
        return dataclasses.replace(updates, vector=updates.vector + config.decay * kernels)

    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(b1=config.momentum),
        optax.stateless(decay),
        optax.scale(-1.0),
    )


def new_state(variables: Variables, tx: "optax.GradientTransformation") -> TrainState:
    """The state of a stage that begins with these variables."""
    rest = {k: v for k, v in variables.items() if k != "params"}
    now = dict(params=flatten(variables["params"]), rest=flatten(rest))
    now, average = (jax.tree.map(jnp.array, now) for _ in range(2))  # copies; they get donated
    return dict(
        variables=now,
        average=average,
        optimizer=tx.init(now["params"]),
        step=jnp.zeros((), jnp.int32),
    )


def unpacked(now: dict[str, FlatTree]) -> Variables:
    """Variables from the "variables" or the "average" of a state."""
    return dict(now["rest"].tree, params=now["params"].tree)


@functools.cache
def make_step(loss: Loss, config: Optimization, mesh: Mesh | None = None) -> Callable:
    """One step as a jitted function (state, batch, rate) -> (state, parts); donates the state.

    Stages with the same loss share one compiled program. On the devices of a `mesh`, the state
    stays whole on each, and batches are split (`placed`). The step is that of one device:
    statistics of batch norm, ranges of eight bits, and losses are those of the whole batch.
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
            params=dataclasses.replace(now["params"], vector=moved), rest=flatten(rest | changed)
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

    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=whole)


def devices_for(batch: int, count: int | None = None) -> Mesh:
    """A mesh with the axis "data" over the first `count` visible devices, to split a batch among.

    None: as many as split the batch evenly. TrainError where `count` does not, or is more than
    there are.
    """
    devices = jax.devices()
    if count is None:
        count = max(n for n in range(1, len(devices) + 1) if batch % n == 0)
    if not 1 <= count <= len(devices):
        raise TrainError(f"devices is {count}; expected 1 to the {len(devices)} visible ones")
    if batch % count:
        raise TrainError(
            f"devices is {count}, and a batch of {batch} cannot be split evenly among them; take a "
            "multiple as the batch, or another number of devices"
        )
    return Mesh(np.asarray(devices[:count]), ("data",))


def placed(tree: Any, mesh: Mesh, split: bool = False) -> Any:
    """The arrays on the mesh: split along their first axis, or whole on every device."""
    spec = PartitionSpec("data") if split else PartitionSpec()
    return jax.device_put(tree, NamedSharding(mesh, spec))
