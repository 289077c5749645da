"""What `test_devices` runs in a process with four host devices; prints what it found, as JSON."""

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qyolop_jax import recipe
from qyolop_jax.config import ModelConfig
from qyolop_jax.model import BatchNorm
from qyolop_jax.optimization import (
    OPTIMIZATION,
    devices_for,
    make_step,
    new_state,
    optimizer,
    placed,
)
from qyolop_jax.scenes import Scenes
from qyolop_jax.stages import Phase, Stage, TrainError
from qyolop_jax.training import fit

TINY = ModelConfig(0.125, "relu", size=(64, 96))
COUNTS = (1, 2, 4)


class Small(nn.Module):
    """A convolution, batch norm and a sum: well conditioned, so that rounding stays small."""

    @nn.compact
    def __call__(self, x_BHWC):
        x = nn.Conv(8, (3, 3), use_bias=False)(x_BHWC)
        x = BatchNorm()(x, True)
        return nn.Dense(1)(nn.relu(x).mean((1, 2)))[:, 0]


class Pictures:
    """Batches of four noisy pictures and their brightness, in which the last ones are brightest."""

    def __init__(self):
        self.at = 0

    def __next__(self):
        rng = np.random.default_rng(self.at)
        self.at += 1
        bright = np.arange(1, 5, dtype=np.float32)
        noise = rng.normal(size=(4, 8, 8, 3)).astype(np.float32)
        return dict(x=noise * bright[:, None, None, None] + bright[0], y=bright)

    def get_state(self):
        return self.at

    def set_state(self, state):
        self.at = state


def loss(variables, batch):
    found, changed = Small().apply(
        {k: v for k, v in variables.items() if k != "most"}, batch["x"], mutable=["batch_stats"]
    )
    total = jnp.mean((found - batch["y"]) ** 2)
    most = jnp.maximum(variables["most"], batch["x"].max())  # as ranges of eight bits follow
    return total, (dict(changed, most=most), {})


def begin(variables):
    if variables is not None:
        return variables
    made = Small().init(jax.random.key(0), jnp.zeros((4, 8, 8, 3)))
    return dict(made, most=jnp.zeros(()))


def phases():
    stages = Stage("one", 3, 4, 5e-2, 1e-2, warmup=1), Stage("two", 2, 4, 1e-2, 1e-3)
    return [Phase(stage, loss, begin, lambda mosaic: Pictures(), per_epoch=4) for stage in stages]


def refused(*asked):
    try:
        devices_for(*asked)
    except TrainError as error:
        return str(error)
    return None


def small():
    """Losses and variables of a run on each number of devices, and on two that become four."""
    runs = {str(n): [(n, None)] for n in COUNTS} | {"2 then 4": [(2, 7), (4, None)]}
    found = {}
    for name, parts_of_run in runs.items():
        folder, losses = Path(tempfile.mkdtemp()), []
        for devices, stop in parts_of_run:

            def note(phase, at, steps, parts, losses=losses, stop=stop):
                if len(losses) + 1 == stop:  # before this step's state is saved
                    raise InterruptedError
                losses.append(float(parts["loss"]))

            how = dict(save_every=1, log_every=1, progress=note, devices=devices)
            with contextlib.suppress(InterruptedError):
                variables = fit(folder, phases(), **how)
        leaves = jax.tree_util.tree_leaves_with_path(variables)
        found[name] = (
            losses,
            {jax.tree_util.keystr(path): np.asarray(a).ravel().tolist() for path, a in leaves},
        )
    mesh = devices_for(4, 4)
    step = make_step(loss, OPTIMIZATION, mesh)
    state = placed(new_state(begin(None), optimizer(OPTIMIZATION)), mesh)
    batch = placed(next(Pictures()), mesh, split=True)
    state, _ = step(state, batch, np.float32(1e-3))
    return dict(
        found=found,
        whole=all(
            a.sharding.is_fully_replicated and len(a.devices()) == 4 for a in jax.tree.leaves(state)
        ),
        images=[s.data.shape[0] for s in batch["x"].addressable_shards],
        chosen={batch: devices_for(batch).size for batch in (1, 2, 3, 4, 6, 8, 9)},
        refused=[refused(4, 3), refused(6, 4), refused(4, 5), refused(4, 0)],
    )


def network():
    """One step of the real network in float and in eight bits, from one state: how far from one
    device each number of devices is, and the same batch in another order on one device."""
    jax.config.update("jax_disable_most_optimizations", True)
    folder = tempfile.mkdtemp()
    stages = recipe.four_stages((0.5, 0.5, 0.5, 0.5), batch=4)
    training = recipe.Training(folder, dict(a=Scenes(8, TINY.size)), TINY, stages)
    tx, found, variables = optimizer(OPTIMIZATION), {}, None
    for phase in (training.phases[0], training.phases[-1]):
        variables = phase.begin(variables)
        batch = next(phase.batches(False))
        turned = {name: a[[2, 0, 3, 1]] for name, a in batch.items()}
        results = {}
        for name, n, images in (*((str(n), n, batch) for n in COUNTS), ("turned", 1, turned)):
            mesh = devices_for(4, n)
            step = make_step(phase.loss, OPTIMIZATION, mesh)
            state = placed(new_state(variables, tx), mesh)
            state, parts = step(state, placed(images, mesh, split=True), np.float32(1e-4))
            state = jax.device_get(state)
            moved, rest = (state["variables"][k].vector for k in ("params", "rest"))
            results[name] = float(parts["loss"]), moved, rest
        alone = results.pop("1")
        found[phase.stage.name] = {
            name: [
                abs(total / alone[0] - 1),
                float(np.linalg.norm(moved - alone[1]) / np.linalg.norm(alone[1])),
                float(np.abs(rest - alone[2]).max() / np.abs(alone[2]).max()),
            ]
            for name, (total, moved, rest) in results.items()
        }
    return found


if __name__ == "__main__":
    print(json.dumps(dict(small=small, network=network)[sys.argv[1]]()))
