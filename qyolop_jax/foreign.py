"""Quantization-aware training of anybody's Flax NNX model, chosen by rules.

    model = qyolop_jax.qat(model, [QatRule(r"conv\\d"), QatRule("head", bits=4)])
    qyolop_jax.calibrate_inputs(model, batches)    # so far it is PTQ
    ...                                            # train it as before: it is an NNX module
    layers = qyolop_jax.integers(model)            # what an integer program needs

The straight-through rounding, the observers and the steps are those of Q-YOLOP.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm_jax.rules import chosen
from qyolop_jax.observe import Observer, ObserverKind, check_percentile, observer
from qyolop_jax.quantize import rounded
from qyolop_jax.scales import TINY, QuantizeError, scale_and_zero

LAYERS = (nnx.Linear, nnx.Conv)
"""The layers that rules choose among."""
CUTS = np.linspace(0.2, 1, 33, dtype=np.float32)
"""Factors of a step that are tried where weights have few bits."""


@dataclasses.dataclass(frozen=True)
class QatRule:
    """How the layers are quantized whose whole path the pattern matches."""

    path: str
    """A regular expression for the path of a layer, such as `layers/.*/up`."""
    bits: int = 8
    """Of weights, 2 to 8: symmetric, with a scale for each output. Inputs have 8."""
    observer: ObserverKind = "percentile"
    """Of the range of the inputs."""
    percentile: float = 99.99

    def __post_init__(self):
        if self.bits not in range(2, 9):
            raise QuantizeError(f"{self.bits} bits a weight; expected 2 to 8")
        check_percentile(self.percentile)
        observer(self.observer)


class Range(nnx.Variable):
    """The lowest and the highest value of an input, float32 [2]. It is no Param."""


class QuantizedLayer(nnx.Module):
    """A layer whose weights and inputs are rounded, with gradients straight through."""

    def __init__(self, layer: Any, rule: QatRule):
        self.layer, self.rule = layer, rule
        self.range = Range(jnp.full(2, jnp.nan, jnp.float32))
        self.watch: Observer | None = None

    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        """What the layer gives for the rounded x and the rounded weights; before
        `calibrate_inputs`, NaN."""
        near = x
        if self.watch is not None:
            self.watch.add(np.asarray(x, np.float32))
        else:
            step, zero = self.input_scale()
            near = rounded(x.astype(jnp.float32) / step, -128 - zero, 127 - zero) * step
        by = self.weight_scale()
        kernel = self.codes() * by.reshape((1,) * (self.layer.kernel.ndim - 1) + (-1,))
        layer = nnx.clone(self.layer)  # its own variables are the ones that are trained
        layer.kernel = nnx.Param(kernel.astype(self.layer.kernel.dtype))
        return layer(near.astype(x.dtype), **options)

    def input_scale(self) -> tuple[jax.Array, jax.Array]:
        """(step, zero point) of the input, float32 []."""
        step, zero = scale_and_zero(self.range[...][None], False)
        return step[0], zero[0]

    def weight_scale(self) -> jax.Array:
        """The step of each output's weights, float32 [O]: their largest is the largest code. With 2
        and 3 bits larger weights may be cut off, by the factor that gives the least squared
        error."""
        kernel = jax.lax.stop_gradient(self.layer.kernel[...]).astype(jnp.float32)
        kernel_XO = kernel.reshape(-1, kernel.shape[-1])
        most = 2 ** (self.rule.bits - 1) - 1
        step_O = jnp.maximum(jnp.abs(kernel_XO).max(0) / most, TINY)
        if self.rule.bits > 3:
            return step_O

        def error(cut):
            step_1O = (step_O * cut)[None]
            near = jnp.clip(jnp.round(kernel_XO / step_1O), -most, most) * step_1O
            return ((near - kernel_XO) ** 2).sum(0)

        cuts = jnp.asarray(CUTS)
        return step_O * cuts[jax.lax.map(error, cuts).argmin(0)]

    def codes(self) -> jax.Array:
        """The weights in steps: whole numbers in float32, of the kernel's shape."""
        kernel = self.layer.kernel[...].astype(jnp.float32)
        by = self.weight_scale().reshape((1,) * (kernel.ndim - 1) + (-1,))
        most = jnp.float32(2 ** (self.rule.bits - 1) - 1)
        return rounded(kernel / by, -most, most)


def qat(model: Any, rules: Sequence[QatRule]) -> Any:
    """A clone of an NNX model whose chosen Linear and Conv layers are `QuantizedLayer`s.

    Parameters keep their values and stay Param, so optimizers and `nnx.grad` find them; `model` is
    untouched. Give it ranges with `calibrate_inputs`, then evaluate it (PTQ) or train it (QAT).
    Raises `llm_jax.rules.RuleError` for a rule that matches no layer, with the nearest paths.
    """
    clone = nnx.clone(model)
    nodes = list(nnx.iter_graph(clone))
    layers = {"/".join(map(str, p)): n for p, n in nodes if type(n) in LAYERS}
    found = chosen(rules, layers)
    new = {id(layers[path]): QuantizedLayer(layers[path], rule) for path, rule in found.items()}
    if id(clone) in new:
        return new[id(clone)]
    for _, node in nodes:
        if isinstance(node, nnx.List):
            for i, child in enumerate(node):
                if id(child) in new:
                    node[i] = new[id(child)]
        elif isinstance(node, nnx.Module):
            for name, child in list(vars(node).items()):
                if id(child) in new:
                    setattr(node, name, new[id(child)])
    return clone


def _layers(model: Any) -> dict[str, QuantizedLayer]:
    found = {
        "/".join(map(str, p)): n for p, n in nnx.iter_graph(model) if isinstance(n, QuantizedLayer)
    }
    if not found:
        raise QuantizeError("the model has no quantized layers; make them with qat(model, rules)")
    return found


def calibrate_inputs(model: Any, batches: Iterable[Any]) -> None:
    """Sets the ranges of the inputs of all quantized layers, from what they see of `batches`.

    `model(batch)` runs without `jit`, with rounded weights and float inputs. Do it again while
    training: inputs move. Raises QuantizeError for a model without
    quantized layers, and ObserveError for layers that see no batch.
    """
    layers = _layers(model)
    for layer in layers.values():
        layer.watch = observer(layer.rule.observer, layer.rule.percentile)
    try:
        for batch in batches:
            model(batch)
        for layer in layers.values():
            layer.range[...] = jnp.asarray(layer.watch.range(), jnp.float32)
    finally:
        for layer in layers.values():
            layer.watch = None


@dataclasses.dataclass(frozen=True)
class IntegerLayer:
    """A layer in whole numbers: y = step_in * scale_O * sum (x - zero_in) code + bias, where x is
    clip(round(input / step_in) + zero_in, -128, 127)."""

    codes: np.ndarray
    """int8, of the kernel's shape."""
    scale_O: np.ndarray
    step_in: float
    zero_in: int
    bias_O: np.ndarray | None


def integers(model: Any) -> dict[str, IntegerLayer]:
    """The quantized layers by their paths, for a program of whole numbers.

    The sums over codes are exact in int32. Raises QuantizeError before `calibrate_inputs`.
    """
    found = {}
    for path, layer in _layers(model).items():
        step, zero = map(float, layer.input_scale())
        if not np.isfinite(step):
            raise QuantizeError(f"{path} has no range yet; call calibrate_inputs")
        bias = layer.layer.bias
        found[path] = IntegerLayer(
            np.asarray(layer.codes()).astype(np.int8),
            np.asarray(layer.weight_scale()),
            step,
            int(zero),
            None if bias is None else np.asarray(bias[...]),
        )
    return found
