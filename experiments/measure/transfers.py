"""Do copies of layers overlap with compute? Times two ways to say where a layer goes, and two
moments to start its copy.

    python -m experiments.measure.transfers --model qwen2.5-7b --layers 28 --tokens 289

On an H200 with jax 0.11.2 (13.05 GB, an earlier form of this script): copies alone 238.4 ms; to
`jax.memory.Space.Device` 260.9 ms; to a concrete `SingleDeviceSharding` 238.6 ms. A copy that
starts while a block is queued waits for that block: `experiments/results/h200_stream_order.jsonl`.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence

import jax
from rich.console import Console

from experiments.common.cli import UserError, run
from llm_jax.attention import Step, causal_step
from llm_jax.cache import KV
from llm_jax.config import DTYPES, Config
from llm_jax.params import Layer, init_layer
from llm_jax.registry import find_model
from llm_jax.stream import to_device
from subspec_jax.offload import offload, streamed_bytes
from subspec_jax.verify import jit_block


@dataclasses.dataclass(frozen=True)
class Transfers:
    """Stream layers through their blocks, and time a pass."""

    model: str = "smollm2-135m"
    layers: int = 12
    tokens: int = 64
    slots: int = 2368
    dtype: str = "bfloat16"
    repeats: int = 3


def one_pass(
    put: Callable[[Layer], Layer],
    queued: bool,
    host: Sequence[Layer],
    x: jax.Array,
    caches: list[KV],
    step: Step,
    cfg: Config,
) -> float:
    """Seconds of a pass with one layer ahead, so that the device holds two streamed layers.

    `put` copies a layer to the device. The host waits for a block and then starts the copy that
    takes its layer's place: with `queued` after it has queued the next block, else before.
    """
    began = time.perf_counter()
    ready, before = [put(host[0])], None

    def replace(i: int) -> None:
        jax.block_until_ready(before)
        if i + 1 < len(host):
            ready.append(put(host[i + 1]))

    for i in range(len(host)):
        if not queued:
            replace(i)
        x, caches[i], done = jit_block(ready.pop(0), x, caches[i], step, cfg)
        if queued:
            replace(i)
        before = done
    jax.block_until_ready(x)
    return time.perf_counter() - began


def copies_alone(host: Sequence[Layer]) -> float:
    """Seconds to copy the layers to the device one after another, with nothing to compute."""
    began, flight = time.perf_counter(), []
    for layer in host:
        flight.append(to_device(layer))
        if len(flight) == 2:
            jax.block_until_ready(flight.pop(0))
    jax.block_until_ready(flight)
    return time.perf_counter() - began


def main(args: Transfers, console: Console) -> None:
    if args.dtype not in DTYPES or min(args.layers, args.tokens, args.repeats) < 1:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, and counts at least 1")
    cfg = dataclasses.replace(find_model(args.model).config, dtype=args.dtype)
    make = jax.jit(init_layer, static_argnames="cfg")
    host = [offload(make(jax.random.key(i), cfg)) for i in range(args.layers)]
    size = sum(map(streamed_bytes, host))
    step = to_device(causal_step(0, args.tokens, args.slots))
    anywhere = lambda layer: jax.device_put(layer, jax.memory.Space.Device)
    ways = {
        "jax.memory.Space.Device": (anywhere, False),
        "SingleDeviceSharding": (to_device, False),
        "the same, a block queued": (to_device, True),
    }
    console.print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {size / 1e9:.2f} GB")

    def show(name: str, seconds: Callable[[], float]) -> None:
        best = min([seconds() for _ in range(args.repeats + 1)][1:])  # the first one compiles
        console.print(f"{name:24s} {best * 1e3:8.1f} ms {size / best / 1e9:6.1f} GB/s")

    show("copies alone", lambda: copies_alone(host))
    for name, (put, queued) in ways.items():
        caches = [to_device(KV.empty(cfg, 1, args.slots)) for _ in host]

        def seconds(put=put, queued=queued, caches=caches) -> float:
            x = to_device(
                jax.random.normal(jax.random.key(1), (1, args.tokens, cfg.d_model), cfg.dtype)
            )
            return one_pass(put, queued, host, jax.block_until_ready(x), caches, step, cfg)

        show(name, seconds)


def cli(words: Sequence[str] | None = None) -> int:
    return run(Transfers, main, __doc__, words, again=None)


if __name__ == "__main__":
    sys.exit(cli())
