"""The command that compares every kernel with float64 NumPy finds what is wrong."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.measure import errors
from experiments.measure.errors import Case, checked, largest_error
from pallas_kernels.rotary_cache import triton


@pytest.mark.parametrize(
    "found, want, error",
    [
        (jnp.array([1.0, -4.0]), [1, -4], 0),
        (jnp.array([1.0, -3.0]), [1, -4], 0.25),
        ((jnp.array([1.0]), jnp.array([6.0])), ([1], [5]), 0.2),
        (jnp.array([jnp.nan]), [1], np.inf),
        (jnp.array([1.0]), [1, 2], np.inf),
    ],
)
def test_an_error_is_the_largest_difference_over_the_largest_number(found, want, error):
    want = tuple(np.asarray(w) for w in want) if isinstance(want, tuple) else np.asarray(want)
    assert largest_error(found, want) == pytest.approx(error)


def test_a_kernel_that_dies_is_a_wrong_case():
    def call(interpret):
        raise RuntimeError("misaligned address")

    found = checked(Case("k", "c", 0.1, call), True)
    assert not found["right"] and found["failed"] == "RuntimeError: misaligned address"


def test_every_case_is_recorded_and_a_wrong_kernel_fails_the_command(tmp_path, capsys, monkeypatch):
    words = ["--only", "rotary_cache", "--output", str(tmp_path / "errors.jsonl")]
    assert errors.cli(words) == 0 and "All 4 cases are right" in capsys.readouterr().out
    right = triton.rotary_cache_triton

    def wrong(*arguments):
        q, k, v = right(*arguments)
        return q.at[0, 0, 0].add(0.5), k, v

    monkeypatch.setattr(triton, "rotary_cache_triton", wrong)
    assert errors.cli(words) == 2 and "4 of 4 cases are wrong" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert [line["right"] for line in lines] == 4 * [True] + 4 * [False]
    assert all(line["error"] <= line["allowed"] for line in lines[:4]) and lines[0]["interpreted"]


def test_a_kernel_that_does_not_exist(capsys):
    assert errors.cli(["--only", "softmax"]) == 2 and "softmax" in capsys.readouterr().err
