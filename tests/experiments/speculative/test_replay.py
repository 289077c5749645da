"""Acceptance traces have the law they claim, and recorded ones are what was recorded."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from experiments.common import records
from experiments.speculative.replay import acceptance_trace
from llm_jax.testing import tiny_config
from subspec_jax.accept import Gate
from subspec_jax.draft_model import Draft
from subspec_jax.methods import MethodError, make_method
from subspec_jax.plan import published_tau
from subspec_jax.tree import TreeSpec

SPEC = TreeSpec("beam", depth=5, width=3, sharpen=0.3)
DRAFT, GATE = Draft(4, 32), Gate("probability", 0.4, 2)
SMALL = tiny_config("llama", layers=1)


def make(name, spec=SPEC, draft_model=SMALL, stop_gain=0.25):
    return make_method(name, spec, DRAFT, GATE, stop_gain, draft_model, 4)


# --- Acceptance traces -------------------------------------------------------------------------


def draws(source, method, count, seed=0):
    return list(itertools.islice(acceptance_trace(source, method, seed)(), count))


@pytest.mark.parametrize("name", ["subspec", "chain", "subspec-own-cache", "subspec-post"])
def test_the_published_trace_has_the_published_mean(name):
    deep = make(name, TreeSpec("beam", depth=48, width=6))
    accepted = draws("published", deep, 40_000)
    assert min(accepted) == 0 and max(accepted) == 48
    hazard = 0.967 if name == "chain" else 0.9749
    # A round emits what is accepted and one token more.
    assert np.mean(accepted) + 1 == pytest.approx(published_tau(48, hazard), rel=0.02)
    if name != "chain":
        assert np.mean(accepted) + 1 == pytest.approx(28.4, rel=0.03)
    survivors = np.mean(np.array(accepted)[:, None] > np.arange(10), axis=0)
    np.testing.assert_allclose(survivors, hazard ** np.arange(1, 11), atol=1 / 96 + 1e-6)


def test_a_published_trace_is_reproducible_and_follows_the_seed():
    method = make("subspec")
    again = acceptance_trace("published", method, 3)
    first, second = (list(itertools.islice(again(), 200)) for _ in range(2))
    assert first == second == draws("published", method, 200, 3)
    assert first != draws("published", method, 200, 4)
    assert max(first) == SPEC.depth
    assert all(type(a) is int for a in first)


@pytest.mark.parametrize("name", ["best-first", "classic", "ngram"])
def test_not_every_method_has_a_published_trace(name):
    with pytest.raises(MethodError, match=f"no published acceptance trace .* {name}"):
        acceptance_trace("published", make(name))


def test_plain_decoding_accepts_nothing_whatever_the_source():
    assert draws("published", make("vanilla"), 5) == draws("/absent", make("vanilla"), 5) == [0] * 5


def record(method, sample, accepted, cut=0):
    emitted = [a + 1 for a in accepted[:-1]] + [accepted[-1] + 1 - cut]
    rounds = dict(accepted=accepted, emitted=emitted)
    return dict(method=method, sample=sample, turn=0, rounds=rounds)


def test_a_recorded_trace_gives_the_methods_rounds_over_and_over(tmp_path):
    path = tmp_path / "records.jsonl"
    for r in [
        record("subspec", "a", [3, 0]),
        record("chain", "a", [9]),
        record("subspec", "b", [5]),
        record("subspec", "c", [48], cut=40),
    ]:
        records.append(path, r)
    assert draws(str(path), make("subspec"), 7) == [3, 0, 5, 3, 0, 5, 3]
    assert draws(str(path), make("chain"), 2) == [9, 9]
    with pytest.raises(MethodError, match="no rounds of the method best-first"):
        acceptance_trace(str(path), make("best-first"))


@pytest.mark.parametrize("content", [None, "not json", "[1]", '{"method": "subspec"}', ""])
def test_a_file_that_is_no_trace_is_refused(tmp_path, content):
    path = tmp_path / "trace.jsonl"
    if content is not None:
        path.write_text(content)
    message = "no rounds of the method" if content == "" else "is no acceptance trace"
    with pytest.raises(MethodError, match=message):
        acceptance_trace(str(path), make("subspec"))


def test_the_recorded_trace_that_comes_along():
    path = Path(__file__).parents[3] / "experiments" / "traces" / "qwen2.5-coder-0.5b.jsonl"
    accepted = draws(str(path), make("subspec"), 62)
    assert accepted[:4] == [48, 48, 40, 48] and accepted[:31] == accepted[31:]
    assert 1 + np.mean(accepted[:20]) == 39.75 and 1 + np.mean(accepted[20:31]) == 40
