"""The draft's tree taken apart, on a small model."""

import dataclasses
import json

import pytest
from rich.console import Console

from experiments.measure import draft_step
from experiments.measure.draft_step import DraftStep, cli, draft_shapes, main
from llm_jax.registry import MODELS
from llm_jax.testing import tiny_config
from pallas_kernels.quantized_matmul import Packed


@pytest.mark.quick_cases("4")
@pytest.mark.parametrize("head_bits", [None, 4])
def test_a_step_and_its_floor(tmp_path, monkeypatch, head_bits):
    cfg = tiny_config("qwen2", layers=2, d_model=128)
    model = dataclasses.replace(MODELS["qwen2.5-7b"], config=cfg)
    monkeypatch.setattr(draft_step.registry, "find_model", lambda name: model)
    monkeypatch.setattr(draft_step, "bandwidth", lambda clock: {"read": 2e-6})
    out = tmp_path / "out.jsonl"
    args = DraftStep(depth=4, width=2, group=32, length=5, max_length=64, head_bits=head_bits,
                output=out, repeats=2)  # fmt: skip
    r = main(args, Console(quiet=True))
    assert json.loads(out.read_text())["bytes"] == r["bytes"] and r["kernels"] == []
    assert r["steps"] == 4 and r["floor"] == pytest.approx(r["bytes"] / 2e6)
    assert r["step_over_floor"] == pytest.approx(r["step"] / r["floor"])


def test_a_model_that_is_not_known(capsys):
    assert cli(["--model", "nothing"]) == 2
    assert "error: no model is named 'nothing'" in capsys.readouterr().err


def test_the_draft_of_a_7b_reads_what_the_plan_says():
    cfg = dataclasses.replace(MODELS["qwen2.5-7b"].config, dtype="bfloat16", layers=2)
    low = draft_shapes(cfg, 4, 64, 4)
    assert all(isinstance(w, Packed) for w in (low.layers[1].mlp.down, low.head_DV))
    assert low.head_DV.size_bytes == 3584 * 152_064 * 9 // 16
    assert draft_shapes(cfg, 4, 64, None).head_DV.size == 3584 * 152_064
