"""Transforms over models that are not llm_jax's, beside the same work over its own.

    python -m experiments.measure.foreign --output foreign.jsonl

One network of plain layers as a dict, in Flax NNX and in Flax Linen, with low-bit weights: the
error against float64 over the same numbers, and the time beside `llm_jax.linear`. Then one decoder
by its four functions: whether SubSpec writes its plain text, and the time of a token beside the
same layers decoded natively. Runs of both take turns, and the medians are compared.
"""

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import subspec_jax
from experiments.common import records
from experiments.common.cli import run
from llm_jax.attention import empty_cache
from llm_jax.config import Config
from llm_jax.extras import need
from llm_jax.linear import linear
from llm_jax.lowbit_array import LowBitArray
from llm_jax.model import block, embed, unembed
from llm_jax.params import init
from subspec_jax import Decoder, ForeignModel, ModelDraft, Rule, Target, TreeSpec
from subspec_jax.draft_model import substitute as substitute_params
from subspec_jax.offload import place


@dataclasses.dataclass(frozen=True)
class Foreign:
    """Compare transforms of foreign models with native ones."""

    width: int = 512
    """Width of a layer, a multiple of 64; its hidden one is three times as wide."""
    layers: int = 4
    """Layers of each model."""
    rows: int = 8
    """Rows of a product."""
    tokens: int = 32
    """Tokens that are decoded."""
    repeat: int = 15
    """Timed runs of each."""
    output: Path = Path("foreign.jsonl")
    """File that lines are added to."""


BITS = {"4 bits": dict(bits=4, group=64), "int8": dict(bits=8, group=0)}


def main(args: Foreign, console: Console) -> int:
    table = Table(title=f"width {args.width}, {args.layers} layers, {jax.devices()[0].device_kind}")
    for name in ("model", "transform", "works", "error", "changed by", "time / native"):
        table.add_column(name)
    shown = lambda value: "" if value is None else f"{value:.1e}"
    for line in (*_products(args), *_decoded(args)):
        extra = dict(device=jax.devices()[0].device_kind, environment=records.environment())
        records.append(args.output, line | extra)
        works, ratio = "yes" if line["works"] else "no", f"{line['over_native']:.2f}"
        found = line["error"], line["changed_by"]
        table.add_row(line["model"], line["transform"], works, *map(shown, found), ratio)
    console.print(table)
    return 0


def _products(args: Foreign):
    """A line for each kind of model and each number of bits."""
    D, F = args.width, 3 * args.width
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(0, shape[0] ** -0.5, shape), jnp.float32)
    params = {str(i): {"up": draw(D, F), "down": draw(F, D)} for i in range(args.layers)}
    x = draw(args.rows, D)
    for kind, (model, apply, path) in _kinds(params, args.layers).items():
        for name, how in BITS.items():
            low = subspec_jax.substitute(model, [Rule(path, **how)])
            native = jax.tree.map(lambda a: a.matrix, _weights(low), is_leaf=_is_low)
            run, beside = jax.jit(apply), jax.jit(_native)
            y, exact, whole = run(low, x), _in_float64(_weights(low), x), apply(model, x)
            size = np.abs(exact).max()
            error = float(np.abs(np.asarray(y, np.float64) - exact).max() / size)
            changed = float(jnp.linalg.norm(y - whole) / jnp.linalg.norm(whole))
            ours = functools.partial(run, low, x), functools.partial(beside, native, x)
            times = _in_turns(*ours, args.repeat)
            # int8 rounds activations too, where a layer multiplies by it
            works = error < (1e-5 if how["group"] else 0.05)
            yield dict(
                model=kind, transform=f"substitutes, {name}", works=works, error=error,
                changed_by=changed, seconds=times[0], native_seconds=times[1],
                over_native=times[0] / times[1],
            )  # fmt: skip


def _kinds(params: dict, layers: int) -> dict[str, tuple[Any, Callable, str]]:
    """Kind -> (the model with these numbers, f(model, x), the path of its matrices)."""
    nnx = need("flax.nnx", "flax", "this measurement")
    nn = need("flax.linen", "flax", "this measurement")

    def plain(params, x):
        for layer in params.values():
            x = x + jax.nn.silu(x @ layer["up"]) @ layer["down"]
        return x

    class Net(nnx.Module):
        def __init__(self, rngs):
            for i, layer in params.items():
                for name, w in layer.items():
                    dense = nnx.Linear(*w.shape, use_bias=False, rngs=rngs)
                    dense.kernel[...] = w
                    setattr(self, f"{name}{i}", dense)

        def __call__(self, x):
            for i in range(layers):
                x = x + getattr(self, f"down{i}")(nnx.silu(getattr(self, f"up{i}")(x)))
            return x

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i, layer in params.items():
                dense = lambda name, i=i, layer=layer: nn.Dense(
                    layer[name].shape[1], use_bias=False, name=f"{name}{i}"
                )
                x = x + dense("down")(nn.silu(dense("up")(x)))
            return x

    kernels = {f"{n}{i}": {"kernel": w} for i, l in params.items() for n, w in l.items()}

    def linen(variables, x):
        with subspec_jax.linen():
            return Linen().apply(variables, x)

    return {
        "dict": (params, plain, r"\d/.*"),
        "Flax NNX": (Net(nnx.Rngs(0)), lambda model, x: model(x), ".*/kernel"),
        "Flax Linen": ({"params": kernels}, linen, "params/.*/kernel"),
    }


def _is_low(a: Any) -> bool:
    return isinstance(a, LowBitArray)


def _weights(model: Any) -> list[LowBitArray]:
    """The low-bit arrays [up, down, up, down …] of any of the models."""
    found = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_low)
    by_name = {jax.tree_util.keystr(path): a for path, a in found if _is_low(a)}
    number = lambda name: "".join(c for c in name if c.isdigit())
    order = sorted(by_name, key=lambda name: (int(number(name)), "down" in name))
    return [by_name[name] for name in order]


def _native(matrices: list, x: jax.Array) -> jax.Array:
    for up, down in zip(matrices[::2], matrices[1::2], strict=True):
        x = x + linear(down, jax.nn.silu(linear(up, x)))
    return x


def _in_float64(weights: list[LowBitArray], x: jax.Array) -> np.ndarray:
    y = np.asarray(x, np.float64)
    for up, down in zip(weights[::2], weights[1::2], strict=True):
        hidden = y @ np.asarray(up, np.float64)
        y = y + hidden / (1 + np.exp(-hidden)) @ np.asarray(down, np.float64)
    return y


def _in_turns(one: Callable, other: Callable, repeat: int) -> tuple[float, float]:
    """Median seconds of both."""
    seconds: tuple[list, list] = [], []
    for i in range(repeat + 2):
        for f, kept in zip((one, other), seconds, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(f())
            if i > 1:
                kept.append(time.perf_counter() - began)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _decoded(args: Foreign):
    """A line for plain decoding by four functions, and one for SubSpec."""
    cfg = Config(
        layers=args.layers, d_model=args.width, heads=args.width // 64, kv_heads=1, head_dim=64,
        d_ff=3 * args.width, vocab=512, qk_norm=True, dtype="float32", family="qwen3",
    )  # fmt: skip
    params, prompt = init(jax.random.key(0), cfg), list(range(40, 56))
    model = ForeignModel(
        embed=lambda top, tokens: embed(top, tokens, cfg),
        block=lambda layer, x, cache, step: block(layer, x, cache, step, cfg),
        unembed=lambda top, x: unembed(top, x, cfg),
        cache=lambda layer, batch, slots: empty_cache(layer.attn, cfg, batch, slots),
    )
    top = dataclasses.replace(params, layers=())
    theirs = model.target(top, params.layers, resident=1)
    ours = Target(dataclasses.replace(params, layers=place(params.layers, 1)), cfg)
    tree, rules = TreeSpec("beam", 4, 2), [Rule(r"layers/\d+/(attn|mlp)/\w+", 8, 0)]
    native = substitute_params(ours.params, 8, 0, layers=range(args.layers))
    native = dataclasses.replace(native, head_DV=params.head_DV)
    pairs = {
        "plain decoding, offloaded": (Decoder(theirs), Decoder(ours)),
        "SubSpec, int8, offloaded": (
            Decoder(theirs, model.draft(theirs, rules, tree)),
            Decoder(ours, ModelDraft(native, cfg, tree)),
        ),
    }
    expected = Decoder(ours).generate(prompt, args.tokens)
    for name, decoders in pairs.items():
        found = [decoder.generate(prompt, args.tokens) for decoder in decoders]
        runs = [functools.partial(d.generate, prompt, args.tokens) for d in decoders]
        times = _in_turns(*runs, max(1, args.repeat // 5))
        yield dict(
            model="four functions", transform=name, works=found == [expected, expected],
            error=None, changed_by=None, seconds=times[0], native_seconds=times[1],
            over_native=times[0] / times[1],
        )  # fmt: skip


def cli(words: Sequence[str] | None = None) -> int:
    return run(Foreign, main, __doc__, words, again=None)


if __name__ == "__main__":
    sys.exit(cli())
