"""The comparison of everything: what it runs, what it makes of failures, and what it computes."""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tyro
from rich.console import Console

from experiments.common.cli import UserError
from experiments.measure import offload as offload_benchmark
from experiments.measure.offload import (
    FOREIGN,
    ON_TEXT,
    STEPS,
    Comparison,
    command,
    comparison_table,
    configurations,
    main,
    measured,
    plot_rates,
    project,
    run_configuration,
)
from experiments.measure.offload_baselines import (
    Baseline,
    resident_layers,
    sizes,
    transformers_config,
)
from experiments.measure.offload_baselines import main as baseline
from experiments.speculative.__main__ import Speculative
from llm_jax.registry import MODELS
from llm_jax.testing import tiny_config, tiny_params, write_safetensors

META = {
    "summaries": [
        {
            "method": "subspec", "passes": 4, "draft_s": 0.4, "verify_s": 0.8, "other_s": 0.04,
            "tokens_per_s": 80.0, "tau": 25.0, "stream_gb_per_s": 50.0, "peak_bytes": 7 * 2**30,
            "replayed": True,
        }
    ],
    "plans": {
        "subspec": {
            "resident": 9, "layers": 28, "streamed_bytes": 10**10, "draft_bytes": 10**10,
            "total": 2**33,
        }
    },
    "link_bytes_per_s": 54e9,
    "memory_bytes_per_s": 4e12,
    "predicted_s": {"subspec": {"round": 0.31, "block": 0.002}},
    "device": {"kind": "a GPU"},
}  # fmt: skip


def test_a_record_says_what_a_run_measured():
    r = measured(META)
    assert r["round_s"] == pytest.approx({"draft": 0.1, "verify": 0.2, "other": 0.01})
    assert r["stream_bytes_per_s"] == 50e9 and r["copy_bytes_per_s"] == 54e9
    assert r["predicted_tokens_per_s"] == pytest.approx(25 / 0.31)
    assert r["copies_s"] == pytest.approx(10 / 54) and r["blocks_s"] == pytest.approx(0.056)
    assert r["pass_over_bound"] == pytest.approx(0.2 * 54 / 10)


def test_a_projection_is_bytes_over_bandwidths_and_the_measured_rest():
    r = measured(META)
    assert project(r, link=25e9, memory=1e12) == pytest.approx(25 / (0.4 + 0.01 + 0.01))
    assert project({"tokens_per_s": 0.75}) is None


@pytest.mark.parametrize("checkpoint", [None, "model"])
def test_every_command_is_one_that_its_program_takes(tmp_path, checkpoint):
    args = Comparison(tmp_path, checkpoint=checkpoint, flags="--chunk 64")
    names = configurations(args)
    assert names == [*STEPS, *(ON_TEXT if checkpoint else ()), *FOREIGN]
    for name in names:
        python, dash_m, module, *flags = command(name, args, tmp_path)
        assert (python, dash_m) == (sys.executable, "-m")
        if name in FOREIGN:
            assert tyro.cli(Baseline, args=flags).lookup == FOREIGN[name]
            continue
        found = tyro.cli(Speculative, args=flags)
        assert module == "experiments.speculative" and found.chunk == 64 and not found.show
        assert found.memory_limit == "8GB" and found.compare == ()
        replays = checkpoint is None
        assert (found.replay_acceptance == "published", found.weights == "random") == (replays,) * 2
        assert (found.stream == "residual") == (name not in ("vanilla", "raw", "kernels"))


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(UserError, match="none of"):
        configurations(Comparison(tmp_path, only=("vanila",)))


def test_what_fails_is_told_and_stops_nothing(tmp_path, monkeypatch):
    args = Comparison(tmp_path, seconds=5)
    seen = []

    def fake(command, env, timeout, **_):
        seen.append(env.get("THIMBLE_KERNELS"))
        if len(seen) == 1:
            raise subprocess.TimeoutExpired(command, timeout)
        return SimpleNamespace(returncode=2, stdout="", stderr="warning\nerror: no room\n")

    monkeypatch.setattr(offload_benchmark.subprocess, "run", fake)
    assert run_configuration("vanilla", args) == {"failed": "not done after 5 s"}
    assert run_configuration("raw", args) == {"failed": "error: no room"}
    assert seen == [None, "off"]  # the one way without kernels
    monkeypatch.setattr(offload_benchmark, "_installed", lambda m: m != "accelerate")
    assert run_configuration("accelerate", args) == {"skipped": "needs pip install accelerate"}


def test_a_second_call_does_what_is_missing(tmp_path, monkeypatch):
    ran = []

    def fake(name, args):
        ran.append(name)
        return measured(META) if name != "raw" else {"failed": "no room"}

    monkeypatch.setattr(offload_benchmark, "run_configuration", fake)
    monkeypatch.setattr(offload_benchmark.records, "environment", dict)
    args, console = Comparison(tmp_path, only=("vanilla", "raw", "residual")), Console(file=None)
    first = main(args, console)
    assert ran == ["vanilla", "raw", "residual"] and len(first) == 3
    main(args, console)
    assert ran[3:] == ["raw"]  # what failed is tried again
    lines = (tmp_path / "offload.jsonl").read_text().splitlines()
    assert [json.loads(line)["configuration"] for line in lines] == [*ran]
    main(Comparison(tmp_path, only=("vanilla",), tokens=7), console)
    assert ran[4:] == ["vanilla"]  # other settings
    assert (tmp_path / "offload.png").stat().st_size > 1000


def test_the_table_has_a_row_for_each(tmp_path):
    settings = dict(model="m", memory_limit="8GB")
    rows = [
        {"configuration": "vanilla", **measured(META), "tokens_per_s": 7.0, "settings": settings},
        {"configuration": "residual", **measured(META), "settings": settings},
        {"configuration": "accelerate", "skipped": "needs pip install accelerate"},
    ]
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(comparison_table(rows))
    text = console.export_text()
    assert "11.4" in text and "1.08" in text and "needs pip install" in text and "1.01" in text
    plot_rates(rows, tmp_path / "x.png")


@pytest.mark.slow
def test_for_real_on_a_small_checkpoint(tmp_path):
    cfg = tiny_config("qwen2", layers=3)
    checkpoint = write_safetensors(tmp_path / "model", tiny_params(cfg), cfg)
    flags = "--dtype bfloat16 --samples 1 --depth 2 --width 2 --draft-group 16 --max-length 192"
    args = Comparison(
        tmp_path / "out", checkpoint=checkpoint, only=("vanilla", "residual"), tokens=6,
        memory_limit="16MB", flags=f"{flags} --chunk 64 --resident 1",
    )  # fmt: skip
    vanilla, residual = main(args, Console(width=150))
    assert "failed" not in vanilla and "failed" not in residual, (vanilla, residual)
    assert vanilla["tau"] == 1.0 and residual["tau"] >= 1.0
    assert residual["streamed_bytes"] < vanilla["streamed_bytes"]
    assert residual["projected_pcie4_tokens_per_s"] > 0


@pytest.mark.parametrize("name", ["qwen2.5-7b", "llama-3.1-8b", "qwen3-8b", "mistral-7b"])
def test_layers_that_fit_beside_the_rest(name):
    cfg = MODELS[name].config
    layer = 2 * (cfg.layer_matrix_elements + cfg.layer_vector_elements)
    few = resident_layers(cfg, 8 * 2**30)
    assert 8 <= few <= 16 and resident_layers(cfg, 8 * 2**30 + layer) == few + 1
    assert resident_layers(cfg, 2**30) == 0 and resident_layers(cfg, 2**40) == cfg.layers


@pytest.mark.slow
@pytest.mark.reference
def test_transformers_on_a_cpu(tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for lookup in (0, 3):
        out = tmp_path / f"{lookup}.json"
        found = baseline(Baseline(out, "tiny", lookup=lookup, tokens=4), Console(quiet=True))
        assert found == json.loads(out.read_text())
        assert found["tokens_per_s"] > 0 and "nothing is offloaded" in found["note"]
    cfg = sizes("tiny")
    same = transformers.AutoModelForCausalLM.from_config(transformers_config(cfg))
    assert sum(p.numel() for p in same.parameters()) == cfg.parameter_count
