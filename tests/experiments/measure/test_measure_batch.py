"""The benchmarks of several texts and of a chat's turns: their lines and their tables."""

import itertools
import json

import pytest

from experiments.measure import batch, turns
from llm_jax import registry
from llm_jax.testing import tiny_config, tiny_params, write_safetensors


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_texts_are_timed_together(tmp_path, monkeypatch, capsys):
    tiny = registry.RegisteredModel("tiny", "a/tiny", tiny_config("qwen3", d_model=128, d_ff=128))
    monkeypatch.setitem(registry.MODELS, "tiny", tiny)
    out = tmp_path / "out.jsonl"
    flags = ["--model", "tiny", "--memory-limit", "100MB", "--stream", "raw", "--prompt", "20"]
    flags += ["--rounds", "4", "--max-length", "200", "--output", str(out), "--here"]
    for method, n in (("subspec", 1), ("subspec", 3), ("vanilla", 3)):
        assert batch.cli([*flags, "--methods", method, "--texts", str(n)]) == 0
    one, three, plain = lines(out)
    assert [r["texts"] for r in (one, three, plain)] == [1, 3, 3] and plain["tau"] == 1
    assert all(1 < r["tau"] <= 9 and r["rounds"] == 4 for r in (one, three))
    for r in (one, three, plain):
        assert r["tokens_per_s"] == pytest.approx(r["texts"] * r["tokens_per_s_a_text"])
        assert r["first_token_s"] > 0
    batch.show(batch.BatchTimes(model="tiny", memory_limit="100MB", output=out), batch.Console())
    assert "tiny in 100MB" in capsys.readouterr().out


@pytest.mark.slow
def test_later_turns_compute_what_is_new(tmp_path, capsys):
    cfg = tiny_config("qwen2", max_length=4096)
    folder = write_safetensors(tmp_path / "model", tiny_params(cfg), cfg)
    out = tmp_path / "out.jsonl"
    flags = [
        "--model",
        str(folder),
        "--memory-limit",
        "full",
        "--depth",
        "2",
        "--draft-group",
        "16",
    ]
    flags += ["--chunk", "256", "--max-length", "4000", "--new-tokens", "6", "--output", str(out)]
    assert turns.cli([*flags, "--quantizer", "nearest"]) == 0
    off, on = lines(out)[:3], lines(out)[3:]
    assert [r["cached_tokens"] for r in off] == [0, 0, 0] and on[0]["cached_tokens"] == 0
    assert [r["prompt_tokens"] for r in off] == [r["prompt_tokens"] for r in on]
    for before, now in itertools.pairwise(on):  # all of the turn before is there
        assert now["cached_tokens"] >= before["prompt_tokens"]
    assert all(r["passes"] > 1 for r in off) and [r["passes"] for r in on[1:]] == [1, 1]
    assert "cached" in capsys.readouterr().out and str(tmp_path) not in json.dumps(on[0]["device"])
