"""Eight bits simulated in float: forward passes for evaluation and training, calibration.

    graph, params = fold(cfg, variables)
    scales = calibrate_scales(graph, params, batches)     # batches of uint8 images
    raw, seen = qat_forward(graph, params, scales, images)
    scales = follow(scales, seen, 0.99)

`scales` says which tensors are quantized and how they share scales. Between the nodes values are in
steps, x / step, and rounding makes them whole numbers. float32 adds those exactly below 2**24, in
any order, so the results are those of `integer`, but with gradients: straight through the rounding,
zero outside the range. The clamp of the rounding does what relu does.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from qyolop_jax.graph import Graph, Node, activate, check_size, convolve, run_graph
from qyolop_jax.observe import observer
from qyolop_jax.scales import (
    DEFAULT,
    INPUT_SCALE,
    PRE,
    TINY,
    QuantizeError,
    Scales,
    Settings,
    factor,
    fixed,
    has_table,
    is_unread,
    plan_quantization,
    steps_of,
    weight_scale,
)

SAMPLED_VALUES = 16384
"""Percentiles in training come from at least this many values of a tensor, if it has them."""


@jax.custom_vjp
def rounded(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """round(x) within [low, high]; the gradient passes where nothing is cut off."""
    return jnp.clip(jnp.round(x), low, high)


def _rounded_forward(x, low, high):
    near = jnp.round(x)
    return jnp.clip(near, low, high), ((near >= low) & (near <= high), low, high)


def _rounded_backward(saved, g):
    inside, low, high = saved
    return jnp.where(inside, g, jnp.zeros_like(g)), jnp.zeros_like(low), jnp.zeros_like(high)


rounded.defvjp(_rounded_forward, _rounded_backward)


def _wide(a):
    return a.reshape(1, 1, 1, -1)


def _forward(graph, params, scales, images_u8, settings, flags):
    """(raw outputs, {tensor: [values]}); flags [convs] choose what is rounded."""
    check_size(images_u8.shape)
    steps = steps_of(graph, scales, settings)
    order = {n.name: i for i, n in enumerate(graph.convs)}
    seen: dict[str, list] = {}

    def conv(node: Node, x):
        p = params[node.name]
        free = node.name in settings.keep
        flag = None if flags is None else flags[order[node.name]]

        def round_to(v, low, high):
            near = rounded(v, jnp.asarray(low), jnp.asarray(high))
            return near if flag is None else jnp.where(flag, near, v)

        step_in, _ = steps(node.inputs[0])
        step, zero = map(_wide, steps(node.name))
        by = weight_scale(p["kernel"], p["bias"], step_in, settings.per_channel)
        unit = fixed(step_in.reshape(()) * by)
        kernel, bias = p["kernel"] / _wide(by), p["bias"] / unit
        if not free:
            kernel = round_to(kernel, jnp.float32(-127), jnp.float32(127))
            bias = round_to(bias, jnp.float32(-(2.0**23)), jnp.float32(2.0**23))
        y = convolve(x, kernel, node) + _wide(bias)  # in steps of step_in * by
        if has_table(node):
            step_pre, zero_pre = map(_wide, steps(node.name + PRE))
            pre = y * _wide(factor(step_in, by, step_pre))
            seen[node.name + PRE] = [pre * step_pre]
            if not free:
                pre = round_to(pre, -128 - zero_pre, 127 - zero_pre)
            y = activate(pre * step_pre, node.act) / step
        else:
            y = activate(y, node.act) * _wide(factor(step_in, by, step))
        seen[node.name] = [y * step]
        if free and is_unread(graph, node):
            return y
        return round_to(y, -128 - zero, 127 - zero)

    raw = run_graph(graph, images_u8.astype(jnp.float32) - 128, conv)
    return {name: x * _wide(steps(name)[0]) for name, x in raw.items()}, seen


def qat_forward(
    graph: Graph, params: Any, scales: Scales, images_u8: jax.Array, settings: Settings = DEFAULT
) -> tuple[dict[str, jax.Array], Scales]:
    """(raw outputs float32, the ranges of this batch, as `Scales`); gradients reach `params`.

    The ranges are percentiles of about `SAMPLED_VALUES` values, or extremes if the observer is
    absmax or ema; if it is mse they are `scales`. They have no gradient.
    """
    raw, seen = _forward(graph, params, scales, images_u8, settings, None)
    if settings.observer == "mse":
        return raw, scales
    made = plan_quantization(graph, settings)
    found: dict[str, list] = {}
    for name, values in seen.items():
        key = made.groups.get(name, name)
        limits = [_limits(x, made.parts[key], settings) for x in values]
        found.setdefault(key, []).extend(limits)
    hull = lambda a: jnp.stack([a[:, :, 0].min(0), a[:, :, 1].max(0)], axis=-1)
    return raw, {name: hull(jnp.stack(a)) for name, a in found.items()}


def _limits(x_BHWC, part, settings):
    """float32 [P, 2]."""
    x, rows = jax.lax.stop_gradient(x_BHWC), []
    for k in range(int(part.max()) + 1):
        y = x if len(part) == 1 else x[..., np.flatnonzero(part == k)]
        C, flat = y.shape[-1], y.ravel()
        if settings.observer == "percentile":
            stride = max(1, flat.size // SAMPLED_VALUES)
            while math.gcd(stride, C) > 1:  # otherwise some channels are never seen
                stride += 1
            flat = jnp.sort(flat[::stride])
            last = flat.size - 1
            far = round(last * settings.percentile / 100)
            rows.append(jnp.stack([flat[last - far], flat[far]]))
        else:
            rows.append(jnp.stack([flat.min(), flat.max()]))
    return jnp.stack(rows)


def follow(scales: Scales, seen: Scales, decay: float) -> Scales:
    """The moving average: `decay` times the old scales plus the rest of the new ones."""
    return {name: decay * a + (1 - decay) * seen[name] for name, a in scales.items()}


def simulated_forward(
    graph: Graph, params: Any, scales: Scales, images_u8: jax.Array, settings: Settings = DEFAULT
) -> dict[str, jax.Array]:
    """Raw outputs with simulated 8 bits, float32; for evaluation."""
    return _forward(graph, params, scales, images_u8, settings, None)[0]


def float_tensors(graph: Graph, params: Any, images_u8: jax.Array) -> tuple[dict, dict]:
    """(raw outputs, {name: values} of all quantized tensors) of the float network."""
    check_size(images_u8.shape)
    seen = {}

    def conv(node, x):
        p = params[node.name]
        y = convolve(x, p["kernel"], node) + _wide(p["bias"])
        if has_table(node):
            seen[node.name + PRE] = y
        seen[node.name] = activate(y, node.act)
        return seen[node.name]

    raw = run_graph(graph, (images_u8.astype(jnp.float32) - 128) * INPUT_SCALE, conv)
    return raw, seen


def images_of(batch: Any) -> jax.Array:
    """The images of a batch, which is a dict with "image" or the images themselves."""
    return batch["image"] if isinstance(batch, dict) else batch


def calibrate_scales(
    graph: Graph, params: Any, batches: Iterable, settings: Settings = DEFAULT
) -> Scales:
    """`Scales` from the values of the float network on `batches`, see `images_of`.

    QuantizeError where there is no batch.
    """
    made = plan_quantization(graph, settings)
    watch = {
        name: [
            observer(settings.observer, settings.percentile, settings.symmetric)
            for _ in range(int(made.parts[name].max()) + 1)
        ]
        for name in made.names(graph)
    }
    run = jax.jit(lambda p, x: float_tensors(graph, p, x)[1])
    count = 0
    for batch in batches:
        count += 1
        for name, x in run(params, jnp.asarray(images_of(batch))).items():
            key, x = made.groups.get(name, name), np.asarray(x)
            for k, one in enumerate(watch[key]):
                part = made.parts[key]
                one.add(x if len(part) == 1 else x[..., part == k])
    if not count:
        raise QuantizeError("no batch to calibrate with; give at least one")
    return {
        name: jnp.asarray([one.range() for one in ones], jnp.float32)
        for name, ones in watch.items()
    }


def sensitivity(
    graph: Graph,
    params: Any,
    scales: Scales,
    batches: Iterable,
    settings: Settings = DEFAULT,
    loss: Callable | None = None,
    progress: Callable[[int], None] | None = None,
    known: Mapping[tuple[int, str], float] | None = None,
    keep: Callable[[int, str, float], None] | None = None,
) -> dict[str, float]:
    """The effect of 8 bits in one convolution alone, by its name; means over the batches.

    Without `loss` it is the lowest signal-to-noise ratio of an output in dB, against the float
    network; with `loss(raw, batch) -> scalar`, the growth of the loss. `progress` gets the number
    of measurements done; there is one for each convolution and batch. `keep(batch number, name,
    value)` gets each of them; those in `known` are not measured again.
    """
    names, known = [n.name for n in graph.convs], known or {}
    quantized = jax.jit(lambda p, s, x, flags: _forward(graph, p, s, x, settings, flags)[0])
    found, done = {name: [] for name in names}, 0
    for at, batch in enumerate(batches):
        x, exact = jnp.asarray(images_of(batch)), None
        run = lambda flags, x=x: quantized(params, scales, x, jnp.asarray(flags))
        for i, name in enumerate(names):
            value = known.get((at, name))
            if value is None:
                exact = run(np.zeros(len(names), bool)) if exact is None else exact
                raw = run(np.arange(len(names)) == i)
                if loss is not None:
                    value = float(loss(raw, batch)) - float(loss(exact, batch))
                else:
                    value = min(sqnr(exact[k], raw[k]) for k in exact)
                if keep:
                    keep(at, name, value)
            found[name].append(value)
            done += 1
            if progress:
                progress(done)
    if not all(found.values()):
        raise QuantizeError("no batch to measure with; give at least one")
    return {name: float(np.mean(values)) for name, values in found.items()}


def sqnr(want: ArrayLike, got: ArrayLike) -> float:
    """Signal-to-noise ratio of `got` in dB; infinite if it equals `want`."""
    want, got = np.asarray(want, np.float64), np.asarray(got, np.float64)
    noise = ((want - got) ** 2).sum()
    return math.inf if noise == 0 else 10 * math.log10(max((want**2).sum(), TINY) / noise)
