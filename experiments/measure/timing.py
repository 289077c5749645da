"""How the commands of this folder measure time.

`wall_seconds` times whole calls. `Clock` times kernels that take microseconds: many calls in a
jitted loop over more weights than a cache holds. In that loop a call waits for the one before it
through `optimization_barrier`, which costs no kernel. Nothing is subtracted, because a decoding
loop pays for launches too.
"""

import concurrent.futures
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul import Packed


def wall_seconds(f: Callable, *args: Any, repeats: int = 5) -> list[float]:
    """The seconds that each of `repeats` calls of `f(*args)` takes until its result is ready.

    One call before them, which may compile, is not counted.
    """
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - began)
    return times


def random_packed(like: Packed, key: jax.Array) -> Packed:
    """A matrix in the shapes of `like`, with random codes around zero and steps near 0.01."""
    bits = lambda a, key: None if a is None else jax.random.bits(key, a.shape, a.dtype)
    words, top, steps = jax.random.split(key, 3)
    *most, K = like.scale_BQSK.shape
    step = jax.random.uniform(steps, (*most, K // 2), jnp.float32, 0.008, 0.012)
    offset = step * (-(2**like.bits - 1) / 2)
    scale = jnp.concatenate([step, offset], axis=-1).astype(jnp.bfloat16)
    return dataclasses.replace(
        like,
        words_BNSc=bits(like.words_BNSc, words),
        top_BNSc=bits(like.top_BNSc, top),
        scale_BQSK=scale,
    )


def chained(f: Callable, turns: int) -> Callable:
    """A function (x, copies) that calls f(x, copy) turns * len(copies) times, one after another.

    It returns x and the results of the last turn.
    """

    def once(x, copies):
        results = []
        for w in copies:  # the next call waits for this one, though no bit of it changes x
            x, y = jax.lax.optimization_barrier((x, f(x, w)))
            results.append(y)
        return x, results

    def run(x, copies):
        zeros = [jnp.zeros(y.shape, y.dtype) for y in jax.eval_shape(once, x, copies)[1]]
        return jax.lax.fori_loop(0, turns, lambda _, carry: once(carry[0], copies), (x, zeros))

    return run


class Clock:
    """Times compiled loops, and knows when its time, `seconds` from now on, is over.

    A loop makes at least `calls` calls and runs `repeats` times; `threads` loops compile at once.
    """

    def __init__(self, seconds: float, repeats: int, calls: int, threads: int):
        self.end = time.monotonic() + seconds
        self.repeats, self.calls, self.threads = repeats, calls, threads

    def over(self) -> bool:
        """Whether the time is used up."""
        return time.monotonic() > self.end

    def turns(self, copies: Sequence) -> int:
        """How often a loop goes over all copies."""
        return math.ceil(self.calls / len(copies))

    def compiled(
        self, functions: Mapping[str, Callable], x: jax.Array, copies: Sequence
    ) -> dict[str, Any]:
        """{name: its compiled loop, or why it does not compile, as text}."""

        def one(f):
            try:
                return jax.jit(chained(f, self.turns(copies))).lower(x, copies).compile()
            except Exception as error:  # one that does not compile must not stop the others
                return f"{type(error).__name__}: {str(error)[:300]}"

        with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
            return dict(zip(functions, pool.map(one, functions.values()), strict=True))

    def microseconds(
        self,
        functions: Mapping[str, Callable],
        x: jax.Array,
        copies: Sequence,
        wanted: jax.Array | None = None,
    ) -> dict[str, dict[str, Any]]:
        """The time of one call of each function, in microseconds, by name.

        {"us": the median, "best_us": the least} or {"failed": why}. Given the result that is
        `wanted` with the first copy, also {"error": the largest error over the largest number}.
        """
        found, loops = {}, {}
        for name, loop in self.compiled(functions, x, copies).items():
            if isinstance(loop, str):
                found[name] = {"failed": loop}
                continue
            try:
                y = jax.block_until_ready(loop(x, copies))[1][0].astype(jnp.float32)
            except Exception as error:
                found[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
                continue
            loops[name], found[name] = loop, {}
            if wanted is not None:
                found[name]["error"] = float(jnp.abs(y - wanted).max() / jnp.abs(wanted).max())
        times = {name: [] for name in loops}
        for _ in range(self.repeats):
            for name, loop in loops.items():
                start = time.perf_counter()
                jax.block_until_ready(loop(x, copies))
                times[name].append(time.perf_counter() - start)
        calls = self.turns(copies) * len(copies)
        for name, some in times.items():
            found[name]["us"] = round(statistics.median(some) / calls * 1e6, 2)
            found[name]["best_us"] = round(min(some) / calls * 1e6, 2)
        return found


def bandwidth(clock: Clock) -> dict[str, float]:
    """TB/s of a large read, and of a large copy, whose bytes are counted read and written."""
    arrays = [jnp.full((2**28,), i, jnp.float32) for i in range(4)]
    ways = {"read": lambda x, w: jnp.sum(w * x), "copy": lambda x, w: w + x}
    found = clock.microseconds(ways, jnp.ones((), jnp.float32), arrays)
    moved = {"read": arrays[0].nbytes, "copy": 2 * arrays[0].nbytes}
    return {name: round(moved[name] / found[name]["us"] / 1e6, 3) for name in ways}
