"""The timers: what is counted, and what happens to a function that fails."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.measure import timing
from experiments.measure.timing import Clock, bandwidth, chained, random_packed, wall_seconds
from pallas_kernels.quantized_matmul.reference import dequantized
from pallas_kernels.quantized_matmul.shapes import MatmulShape


@pytest.fixture
def ticks(monkeypatch):
    """A clock that a test sets: perf_counter gives `ticks[0]`."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    return now


def test_the_first_call_is_not_counted(ticks):
    takes, seen = iter([100.0, 1.0, 3.0, 2.0]), []

    def work(*args):
        seen.append(args)
        ticks[0] += next(takes)

    assert wall_seconds(work, "a", 2, repeats=3) == [1.0, 3.0, 2.0]
    assert seen == [("a", 2)] * 4


def test_a_clock_is_over_when_its_seconds_are_used_up(ticks):
    clock = Clock(10, 1, 1, 1)
    ticks[0] = 10.0
    assert not clock.over()
    ticks[0] = 10.1
    assert clock.over()


def test_a_loop_calls_every_copy_in_every_turn():
    """Counted at run time by a callback."""
    calls = []

    def f(x, w):
        jax.debug.callback(lambda w: calls.append(float(w)), w)
        return x + w

    copies = [jnp.float32(w) for w in (1, 2, 3)]
    x, results = jax.jit(chained(f, 2))(jnp.float32(10), copies)
    jax.effects_barrier()
    assert sorted(calls) == [1, 1, 2, 2, 3, 3]
    assert float(x) == 10 and [float(y) for y in results] == [11, 12, 13]


def test_functions_that_fail_do_not_stop_the_others():
    def unsupported(x, w):
        raise NotImplementedError("no such layout")

    ways = {"plus": lambda x, w: x + w, "odd": unsupported, "double": lambda x, w: x + 2 * w}
    copies = [jnp.full(4, w, jnp.float32) for w in (1, 2)]
    clock = Clock(60, repeats=2, calls=5, threads=2)
    assert clock.turns(copies) == 3  # 6 calls are the first number that is 5 or more
    found = clock.microseconds(ways, jnp.ones(4, jnp.float32), copies, jnp.full(4, 2.0))
    assert found["odd"] == {"failed": "NotImplementedError: no such layout"}
    assert set(found["plus"]) == {"us", "best_us", "error"}
    assert 0 < found["plus"]["best_us"] <= found["plus"]["us"]
    assert found["plus"]["error"] == 0 and found["double"]["error"] == pytest.approx(0.5)


def test_bandwidths_are_bytes_over_time(monkeypatch):
    monkeypatch.setattr(timing.jnp, "full", lambda shape, *_: np.zeros(2**8, np.float32))
    clock = Clock(60, 1, 1, 1)
    clock.microseconds = lambda *_: {"read": {"us": 0.5}, "copy": {"us": 0.25}}
    # 1024 bytes in 0.5 us are 0.002048 TB/s; a copy moves them twice, in half the time
    assert bandwidth(clock) == {"read": 0.002, "copy": 0.008}


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4])
def test_random_matrices_lie_around_zero(bits):
    like = MatmulShape(128, 512).packed(bits)
    w, dense = jax.jit(lambda key: (w := random_packed(like, key), dequantized(w)))(
        jax.random.key(0)
    )
    same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)
    assert jax.tree.all(jax.tree.map(same, like, w))
    dense = np.asarray(dense, np.float64)
    step, levels = 0.01, 2**bits
    assert abs(dense.mean()) < 0.02 * step * levels
    assert dense.std() == pytest.approx(step * np.sqrt((levels**2 - 1) / 12), rel=0.05)
