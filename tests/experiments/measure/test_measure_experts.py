"""The benchmark of models with experts: its lines, its table, and what it predicts."""

import json

import numpy as np
import pytest

from experiments.measure import experts
from llm_jax import registry
from llm_jax.config import Experts
from llm_jax.testing import tiny_config


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_plain_passes_and_trees_are_timed(tmp_path, monkeypatch, capsys):
    cfg = tiny_config("qwen3", layers=3, d_model=128, experts=Experts(16, 4, 64))
    tiny = registry.RegisteredModel("tiny", "a/tiny", cfg)
    monkeypatch.setitem(registry.MODELS, "tiny", tiny)
    out = tmp_path / "out.jsonl"
    flags = ["--here", "--model", "tiny", "--memory-limit", "13MB", "--depths", "2", "3"]
    flags += ["--rounds", "3", "--max-length", "128", "--zipf", "0", "--output", str(out)]
    for method in ("plain", "tree", "all"):
        assert experts.cli([*flags, "--only", method]) == 0
    plain, two, three, whole = lines(out)
    assert [r["depth"] for r in (plain, two, three, whole)] == [0, 2, 3, 0]
    assert plain["tau"] == 1 and plain["needed_a_layer"] == 4  # one token, four experts
    assert two["needed_a_layer"] >= 4 and 1 < two["tau"] <= 3 and 1 < three["tau"] <= 4
    size = 3 * 128 * 64 * 4
    assert whole["bytes_a_pass"] % (16 * size) == 0  # whole layers
    assert "predicted_s" not in whole
    for line in (plain, two, three):
        parts, measured = line["predicted_s"], line["tau"] / line["tokens_per_s"]
        assert line["predicted_over_measured"] == pytest.approx(parts["round"] / measured)
        assert line["counted_over_measured"] == pytest.approx(parts["counted"] / measured)
        assert 0 < parts["block"] < parts["round"]
    assert plain["predicted_s"]["draft"] == 0 < two["predicted_s"]["draft"]
    assert str(tmp_path) not in json.dumps([plain, two, three, whole])
    said = capsys.readouterr().out
    assert "tiny in 13MB" in said and "tree, raw" in said
    ratio = f"{three['predicted_over_measured']:.2f}"
    assert f"tree, depth 3: predicted / measured {ratio}, with counted routing" in said


def test_flags_are_passed_on():
    args = experts.ExpertTimes(model="x", depths=(4, 8), only=("tree",), here=True)
    assert experts.words_of(args) == ["--model", "x", "--depths", "4", "8"]
    assert experts.words_of(experts.ExpertTimes()) == []


@pytest.mark.parametrize("flags", (["--only", "some"], ["--rounds", "1"], ["--depths", "0"]))
def test_flags_are_checked(flags, capsys):
    assert experts.cli(flags) == 2
    assert "error: " in capsys.readouterr().err


def test_experts_a_pass_is_expected_to_fetch():
    """Against a simulation: tokens choose experts alone, by popularity."""
    rng = np.random.default_rng(0)
    popular_LE = rng.random((3, 8)) ** 3 + 0.01
    tokens, chosen, kept = 5, 1, 6
    got = experts.expected_experts(popular_LE, tokens, chosen, kept)
    away = np.ones(24, bool)
    away[np.argsort(-popular_LE.reshape(-1))[:kept]] = False
    chance = popular_LE / popular_LE.sum(1, keepdims=True)
    counts = []
    for _ in range(4000):
        drawn = [np.isin(np.arange(8), rng.choice(8, tokens, p=chance[l])) for l in range(3)]
        counts.append((np.concatenate(drawn) & away).sum())
    assert got == pytest.approx(np.mean(counts), rel=0.03)
    assert experts.expected_experts(popular_LE, tokens, chosen, 24) == 0
