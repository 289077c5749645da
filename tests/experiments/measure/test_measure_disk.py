"""The benchmark of layers on disk: its lines, on a tiny model."""

import json

import pytest

from experiments.measure import disk
from llm_jax import registry
from llm_jax.testing import tiny_config


@pytest.mark.slow
@pytest.mark.parametrize("stream, limit", [("raw", "15MB"), ("residual", "10MB")])
def test_layers_on_disk_are_timed(tmp_path, monkeypatch, capsys, stream, limit):
    cfg = tiny_config("qwen3", d_model=128, d_ff=128, layers=5, max_length=2048)
    monkeypatch.setitem(registry.MODELS, "tiny", registry.RegisteredModel("tiny", "a/tiny", cfg))
    out = tmp_path / "out.jsonl"
    flags = ["--model", "tiny", "--memory-limit", limit, "--host-limit", "10KB", "--rounds", "3"]
    flags += ["--folder", str(tmp_path / "layers"), "--stream", stream, "--depth", "3"]
    flags += ["--max-length", "192", "--prompt", "20", "--output", str(out)]
    assert disk.cli(flags) == 0, capsys.readouterr().err
    lines = {line["case"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert list(lines) == ["start", "load", "disk", "stream", "subspec", "vanilla"]
    assert lines["disk"]["gb_s"] > 0 and lines["stream"]["disk_bytes"] > 0
    for name, tau in (("subspec", (1, 4)), ("vanilla", (1, 1))):
        found = lines[name]
        assert found["rounds"] == 3 and tau[0] <= found["tau"] <= tau[1]
        assert found["on_disk"] > 0 and found["over_the_bound"] > 0
        assert found["memory"]["most_rss"] >= found["memory"]["rss"] > 0


def test_a_model_that_fits_is_refused(tmp_path, monkeypatch, capsys):
    cfg = tiny_config("qwen3", d_model=128, d_ff=128, layers=2)
    tiny = registry.RegisteredModel("tiny", "a/tiny", cfg)
    monkeypatch.setitem(registry.MODELS, "tiny", tiny)
    flags = ["--model", "tiny", "--folder", str(tmp_path), "--stream", "raw", "--max-length", "192"]
    assert disk.cli(flags) == 2
    assert "lower --host-limit" in capsys.readouterr().err
