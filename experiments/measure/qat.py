"""How much do few bits cost a small Flax NNX network, and what does training with them win back?

    python -m experiments.measure.qat --output qat.jsonl

Two convolutions and a linear layer on the 1,797 digits that come with scikit-learn: accuracy on 397
of them, which training and calibration do not see. Weights are rounded to so many bits and inputs
to 8, by `qyolop_jax.qat`: first without training (PTQ), then trained on (QAT). About half a minute
on two CPU cores.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

import qyolop_jax
from experiments.common import records
from experiments.common.cli import run
from llm_jax.extras import need
from qyolop_jax import QatRule

TRAINED, SEEN = 1400, 256
"""Digits that are trained on, and those of them that inputs are calibrated on."""
Digits = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DigitsQat:
    """Train in float32, then round and train on."""

    bits: tuple[int, ...] = (8, 4, 3, 2)
    """Bits of weights, each from the same float network."""
    steps: int = 300
    """Of the float training; QAT has half as many, at a third of the rate."""
    seed: int = 0
    output: Path | None = None


class Net(nnx.Module):
    """Two convolutions and a linear layer, images [B, 8, 8, 1] to logits [B, 10]."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.body = nnx.List([nnx.Conv(8, 16, (3, 3), strides=2, use_bias=False, rngs=rngs)])
        self.head = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv(x))
        for layer in self.body:
            x = nnx.relu(layer(x))
        return self.head(x.reshape(len(x), -1))


def digits() -> Digits:
    """(images float32 [1797, 8, 8, 1] from -1 to 1, labels), shuffled."""
    load = need("sklearn.datasets", "test", "the digits").load_digits
    images, labels = load(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    return images[order], labels[order].astype(np.int32)


def train(model: Any, data: Digits, steps: int, rate: float, seed: int = 0) -> None:
    """Trains the model in place, 64 of the first `TRAINED` images a step."""
    images, labels = data
    optimizer = nnx.Optimizer(model, optax.adam(rate), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    rng = np.random.default_rng(seed)
    with jax.numpy_dtype_promotion("standard"):  # optax's adam mixes int32 and float32
        for _ in range(steps):
            some = rng.integers(0, TRAINED, 64)
            step(model, optimizer, images[some], labels[some])


def accuracy(model: Any, data: Digits) -> float:
    """On the images that are not trained on."""
    images, labels = data
    found = nnx.jit(lambda m, x: m(x))(model, images[TRAINED:]).argmax(-1)
    return float((found == labels[TRAINED:]).mean())


def measure(args: DigitsQat, emit: Callable[[dict[str, Any]], None]) -> None:
    """Emits a line for float32 and one for each number of bits."""
    data, net = digits(), Net(nnx.Rngs(args.seed))
    train(net, data, args.steps, 3e-3, args.seed)
    emit(dict(weights="float32", accuracy=accuracy(net, data)))
    for bits in args.bits:
        model = qyolop_jax.qat(net, [QatRule(".*", bits)])
        found = {}
        for name in ("ptq", "qat"):
            if name == "qat":
                train(model, data, args.steps // 2, 1e-3, args.seed)
            qyolop_jax.calibrate_inputs(model, [data[0][:SEEN]])
            found[name] = accuracy(model, data)
        emit(dict(weights=f"{bits} bits") | found)


def main(args: DigitsQat, console: Console) -> None:
    table = Table("weights", "PTQ", "QAT", box=None)
    extra = dict(device=jax.devices()[0].device_kind, environment=records.environment())

    def emit(line: dict[str, Any]) -> None:
        if args.output:
            records.append(args.output, line | dict(seed=args.seed, steps=args.steps) | extra)
        shown = [line.get("ptq", line.get("accuracy")), line.get("qat")]
        table.add_row(line["weights"], *("" if a is None else f"{a:.3f}" for a in shown))

    measure(args, emit)
    console.print(table)


def cli(words: Sequence[str] | None = None) -> int:
    return run(DigitsQat, main, __doc__, words, again=None)


if __name__ == "__main__":
    sys.exit(cli())
