"""The timing of attention kernels, with XLA on a CPU and a clock that a test sets."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments.common.cli import UserError
from experiments.measure import kernels
from experiments.measure.kernels import Kernels, attention_table, main
from pallas_kernels.shapes import LowrankShape


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A small shape, and a device on which a call takes 6 us in two kernels."""
    shape = LowrankShape(4, 2, 16, groups=1, k_rank=16, v_rank=32, rope_theta=1e4)
    monkeypatch.setattr(kernels, "LOWRANK", {"small": shape})
    monkeypatch.setattr(kernels.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(kernels, "_device_bandwidth", lambda repeats: {"read": 1.0, "copy": 1.0})

    def device_microseconds(f, arguments, repeats):
        results = jax.jit(f)(*arguments)
        assert all(np.isfinite(np.asarray(y, np.float32)).all() for y in results)
        return 6.0 * len(results), {"dot": 4.0 * len(results), "softmax": 2.0 * len(results)}

    monkeypatch.setattr(kernels, "device_microseconds", device_microseconds)
    return Kernels(
        shapes=("small",), points=("1x64",), rotate_mb=0, out=tmp_path / "out.jsonl",
        ways=("xla", "int4-full", "cudnn", "latents-4-xla"),
        plot=tmp_path / "plot.png",
    )  # fmt: skip


@pytest.mark.slow
def test_every_way_has_a_record_and_one_that_fails_says_why(small):
    with jax.numpy_dtype_promotion("standard"):  # which JAX's own attention needs
        main(small, Console(quiet=True))
    first, *rest = (json.loads(line) for line in small.out.read_text().splitlines())
    assert first["way"] == "bandwidth" and first["TB/s"]["read"] == 1.0
    assert [(r["batch"], r["slots"], r["way"]) for r in rest] == [(1, 64, w) for w in small.ways]
    for r in rest:
        if r["way"] == "cudnn":  # a CPU has no cuDNN
            assert r["error"] and "microseconds" not in r
        else:
            assert (r["microseconds"], r["copies"]) == (6.0, 1)
            assert r["kernels"] == {"dot": 4.0, "softmax": 2.0}
    size = {r["way"]: r["cache_bytes"] for r in rest if "error" not in r}
    values = 2 * 64 * 2 * 16  # keys and values, slots, kv heads, head size
    assert size["xla"] == 2 * values
    assert size["int4-full"] == values // 2 + 2 * 2 * (values // 16)  # codes, and two scales each
    assert size["latents-4-xla"] == 64 * ((16 + 32) // 2 + 2 * 2 * 2)  # codes, steps and offsets
    assert small.plot.stat().st_size > 1000


def test_the_table_compares_with_the_best_16_bit_cache(small):
    found = [{"TB/s": {"read": 1.0}}]
    for way, us in (("xla", 8.0), ("latents-4-xla", 2.0)):
        found.append({"shape": "small", "batch": 1, "slots": 64, "way": way, "microseconds": us})
    found.append({"shape": "small", "batch": 2, "slots": 64, "way": "xla", "error": "no memory"})
    console = Console(width=180, record=True, file=io.StringIO())
    console.print(attention_table(found, small))
    text = console.export_text()
    assert "8.0 (1.00x)" in text and "2.0 (4.00x)" in text and "-" in text


def test_what_is_unknown_is_named(small, monkeypatch):
    odd = dataclasses.replace(small, shapes=("small", "large"), ways=("xla", "yla"))
    with pytest.raises(UserError, match="unknown: large, yla; shapes are small, and ways cudnn"):
        main(odd, Console(quiet=True))
    with pytest.raises(UserError, match="'4096' is no BATCHxTOKENS point, such as 1x4096"):
        main(dataclasses.replace(small, points=("1x64", "4096")), Console(quiet=True))
    monkeypatch.setattr(kernels.jax, "default_backend", lambda: "cpu")
    with pytest.raises(UserError, match="there is no GPU"):
        main(small, Console(quiet=True))


def test_shapes_are_those_of_the_kernels():
    assert all(isinstance(shape, LowrankShape) for shape in kernels.LOWRANK.values())
    assert set(Kernels().shapes) <= set(kernels.LOWRANK)
    assert set(Kernels().ways) <= {*kernels.FULL_CACHES, *kernels.LATENTS}
