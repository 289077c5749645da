"""The fused Mosaic kernel, interpreted, against float64. Its lowering is in test_lowering.py.

The interpreter knows no layouts: that the card's numbers are right is checked on a card only.
"""

import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from test_lowrank_attention import error, in_float64, poisoned, problem

from pallas_kernels.device import mosaic_missing
from pallas_kernels.lowrank_attention import lowrank_attention, why_not_mosaic
from pallas_kernels.lowrank_attention.absorption import can_absorb

needs_mosaic = pytest.mark.skipif(mosaic_missing() is not None, reason=str(mosaic_missing()))
MIDDLE = dict(size=64, k_rank=64, v_rank=64, heads=2)

CASES = {
    "16 bits, masked, a last tile of 40": dict(slots=104, groups=1, extras=("mask",), bits=16),
    "8 bits, two spans and a part, two groups": dict(slots=280, batch=1, ragged=False, bits=8),
    "4 bits, ragged": dict(slots=136, bits=4, groups=1, v_rank=192),
    "no slot at all": dict(slots=72, bits=16, groups=1, lengths=(72, 0)),
}


def interpreted_error(case: str) -> float:
    """Of the interpreted kernel; NaN in slots that do not exist must not matter."""
    from pallas_kernels.lowrank_attention.mosaic import lowrank_attention_mosaic
    from pallas_kernels.lowrank_attention.reference import finish

    settings = MIDDLE | CASES[case]
    lengths = settings.pop("lengths", None)
    (q, k, v, up_k, up_v, frequencies, found), options = problem(**settings)
    lengths = found if lengths is None else jnp.asarray(lengths, jnp.int32)
    y = lowrank_attention_mosaic(
        q, poisoned(k, lengths), poisoned(v, lengths), up_k, frequencies, lengths,
        interpret=True, span=128, programs=3, **options,
    )  # fmt: skip
    got = finish(y, None, up_v, (up_k.shape[2],) * up_k.shape[0], None, None, q.dtype)
    some = np.asarray(lengths) > 0
    assert np.isfinite(np.asarray(got, np.float64)).all()
    whole = jnp.maximum(lengths, 1)
    want = in_float64(q, k, v, up_k, up_v, frequencies, whole, **options)
    return error(got[some], want[some])


@needs_mosaic
@pytest.mark.quick_cases("16 bits, masked, a last tile of 40")
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_the_formula_and_has_no_races(case):
    """In a process of its own: three warpgroups wait for each other in as many threads of XLA."""
    program = (
        f"from test_mosaic_lowrank import interpreted_error\nprint(interpreted_error({case!r}))"
    )
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=150,
        cwd=pathlib.Path(__file__).parent,
        env={**os.environ, "NPROC": "16", "JAX_PLATFORMS": "cpu"},
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert "RACE" not in found.stdout + found.stderr
    assert float(found.stdout.split()[-1]) < 8e-3


REASONS = {
    "2 query positions": dict(positions=2),
    "grouped queries": dict(shared=2),
    "k_norm_H": dict(extras=("norm",)),
    "position_BS": dict(extras=("position",)),
    "k_bias_KH": dict(extras=("bias",)),
    "8 kv heads a group": dict(heads=8, groups=1),
    "cannot be absorbed": dict(size=32),
    "101 slots": dict(slots=101),
    "v rank 96": dict(v_rank=96),
    "k rank 40 is not a multiple": dict(k_rank=40),
    "float32": dict(dtype=jnp.float32),
    "bytes of shared memory": dict(k_rank=256, v_rank=1024, heads=4),
}


@needs_mosaic
@pytest.mark.parametrize("reason", REASONS)
def test_what_the_kernel_cannot_do_is_named(reason):
    positional, options = problem(**MIDDLE | dict(slots=104) | REASONS[reason])
    assert reason in why_not_mosaic(*positional, **options)
    with pytest.raises(NotImplementedError, match=reason):
        lowrank_attention(*positional, **options, implementation="mosaic")


def test_an_old_jax_says_so(monkeypatch):
    monkeypatch.setattr("jax.__version_info__", (0, 10, 2))
    positional, _ = problem(**MIDDLE, slots=16)
    assert "Mosaic GPU kernels need 0.11" in why_not_mosaic(*positional)
    with pytest.raises(NotImplementedError, match=r"need 0\.11"):
        lowrank_attention(*positional, implementation="mosaic")


@needs_mosaic
def test_plans():
    """Llama-2-7B: every multiprocessor is busy, and what a program holds fits."""
    from pallas_kernels.lowrank_attention.mosaic import PROGRAMS, plan_of
    from pallas_kernels.lowrank_attention.mosaic_plan import SHARED_MEMORY
    from pallas_kernels.shapes import LOWRANK

    shape = LOWRANK["llama-2-7b"]
    for batch, slots, span, runs in ((1, 65536, 1024, 16), (1, 8192, 512, 16), (8, 4096, 1024, 2)):
        for bits in (16, 8, 4):
            q, k, v, *_ = shape.arguments(batch, slots, bits)
            plan = plan_of(k, v, 4, True, None, PROGRAMS)
            assert (plan.span, plan.runs) == (span, runs)
            assert plan.shared_bytes <= SHARED_MEMORY
            assert plan.runs * plan.each * plan.span >= slots
            assert can_absorb(q, 4, 8, shape.frequencies, span, ())
