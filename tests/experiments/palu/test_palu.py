"""experiments.palu on a tiny checkpoint: numbers against another way, resuming, errors."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.palu import __main__ as palu
from experiments.palu import corpora, evaluate
from experiments.palu.flags import FlagError, Palu, methods_of
from experiments.palu.methods import RIVALS
from experiments.palu.run import PaluRun
from llm_jax.attention import caches_for, causal_step
from llm_jax.cache import empty_caches
from llm_jax.config import ConfigError
from llm_jax.formats import open_checkpoint
from llm_jax.model import forward
from llm_jax.testing import tiny_config, tiny_params, write_safetensors
from palu_jax import rank, store
from palu_jax.convert import ConvertError, Recipe, to_palu
from palu_jax.format import LatentFormat

CFG = tiny_config("qwen2", kv_heads=2)
WINDOWED = tiny_config("mistral")
PARAMS = tiny_params(CFG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_safetensors(path, PARAMS, CFG)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_perplexity(batch):
    """Against log-probabilities of one plain pass in float64."""
    windows = np.random.default_rng(0).integers(0, CFG.vocab, (3, 24)).astype(np.int32)
    caches, step = caches_for(PARAMS, CFG, 3, 24), causal_step(0, 24, 24)
    logits = np.asarray(forward(PARAMS, jnp.asarray(windows), caches, step, CFG)[0], np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -np.take_along_axis(logp[:, :-1], windows[:, 1:, None], -1).mean()
    found = evaluate.perplexity(PARAMS, windows, CFG, batch)
    np.testing.assert_allclose(found["nll"], want, rtol=1e-5)
    np.testing.assert_allclose(found["perplexity"], np.exp(want), rtol=1e-4)
    assert found["tokens"] == 3 * 23 and found["cache_bytes_per_token"] == 2 * 2 * 2 * 16 * 4


@pytest.mark.slow
def test_bytes_are_those_of_the_arrays():
    form = LatentFormat(4, 2)
    recipe = Recipe((2,), (((8,), (12,)), ((6,), (16,))), "plain", form)
    converted = to_palu(PARAMS, CFG, recipe)
    windows = np.zeros((1, 8), np.int32)
    found = evaluate.perplexity(converted, windows, CFG)
    assert found["cache_bytes_per_token"] == (4 + 4 + 3 + 4) + (3 + 4 + 4 + 4)


def arguments(folder, output, **changes) -> Palu:
    base = dict(
        checkpoint=folder, output=output, dtype="float32", calibration_tokens=128,
        calibration_length=32, tokens=64, context=32, keep=(0.5,), bits=(16, 4),
    )  # fmt: skip
    return Palu(**(base | changes))


def quiet():
    return Console(quiet=True)


def test_a_model_with_windows_is_measured_as_it_is(tmp_path):
    """24 tokens at a time, of which attention sees 6; the cache has 16 bits a number."""
    folder = write_safetensors(tmp_path / "model", tiny_params(WINDOWED), WINDOWED)
    stated = json.loads((folder / "config.json").read_text()) | dict(sliding_window=6)
    (folder / "config.json").write_text(json.dumps(stated))
    checkpoint = open_checkpoint(folder)
    cfg = checkpoint.config("float32")
    assert cfg.window == 6
    args = arguments(folder, tmp_path / "out", preset="none", keep=(), tokens=48, context=24)
    assert palu.main(args, quiet()) == 0
    record = json.loads((args.output / "records.jsonl").read_text())
    tokens = checkpoint.tokenizer().encode(corpora.text("python", "evaluation"))
    windows = jnp.asarray(tokens[:48], jnp.int32).reshape(2, 24)
    logits, _ = forward(
        checkpoint.load(cfg), windows, empty_caches(cfg, 2, 24), causal_step(0, 24, 24), cfg
    )
    logits = np.asarray(logits, np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -np.take_along_axis(logp[:, :-1], np.asarray(windows)[:, 1:, None], -1).mean()
    np.testing.assert_allclose(record["result"]["nll"], want, rtol=1e-3)


def test_a_small_run_measures_stores_and_reports(folder, tmp_path, capsys):
    args = arguments(
        folder, tmp_path / "out", bits=(4,), objective=("whitened",), search=("uniform",),
        calibration_length=16, calibration_tokens=32, context=16, tokens=16,
        save=tmp_path / "stored",
    )  # fmt: skip
    assert palu.main(args, Console(width=110)) == 0
    shown = capsys.readouterr().out
    assert "Decomposing (groups of 2, whitened) …" in shown and "palu 0.5 J 4 bit" in shown
    rows = [json.loads(l) for l in (tmp_path / "out/records.jsonl").read_text().splitlines()]
    assert [r["method"] for r in rows] == ["dense", "palu 0.5 J 4 bit, whitened"]
    assert (rows[1]["rank_kept"], rows[1]["key_rank_share"]) == (0.5, 0.5)
    # Two layers, keys and values: 16 latents of half a byte, and a step and an offset.
    assert rows[1]["result"]["cache_bytes_per_token"] == 4 * (16 // 2 + 4)
    assert store.describe(tmp_path / "stored").recipe.format.key_bits == 4


@pytest.mark.slow
def test_a_run_resumes_and_reports(folder, tmp_path, capsys, monkeypatch):
    args = arguments(folder, tmp_path / "out", rivals=("int4", "kivi4"), granularity=("J", "M"))
    console = Console(width=110)
    assert palu.main(args, console) == 0
    shown = capsys.readouterr().out
    assert "palu 0.5 M 4 bit, gradient, error" in shown and "kivi4" in shown
    lines = (tmp_path / "out/records.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert found[0]["method"] == "dense" and len(found) == 1 + 4 + 2
    assert found[0]["bf16_bytes_per_token"] == found[0]["result"]["cache_bytes_per_token"]
    assert (tmp_path / "out/quality_against_size.png").stat().st_size > 5000
    assert list((tmp_path / "out").glob("statistics-*.npz"))
    # Half of it is lost; only that half is measured again.
    (tmp_path / "out/records.jsonl").write_text("\n".join(lines[:4]) + "\n")
    asked = []
    real = evaluate.perplexity
    monkeypatch.setattr(evaluate, "perplexity", lambda *a, **k: asked.append(1) or real(*a, **k))
    assert palu.main(args, console) == 0
    again = [json.loads(l) for l in (tmp_path / "out/records.jsonl").read_text().splitlines()]
    assert len(asked) == 3
    for a, b in zip(found, again, strict=True):
        assert (a["method"], a["settings"], a["result"]) == (
            b["method"],
            b["settings"],
            b["result"],
        )


@pytest.mark.slow
def test_saving_retrieval_and_generation(folder, tmp_path):
    args = arguments(
        folder, tmp_path / "out", bits=(4,), save=tmp_path / "stored", retrieval=1,
        retrieval_pairs=2, generate="hi", objective=("whitened",), search=("uniform",),
        context=64, tokens=64,
    )  # fmt: skip
    assert palu.main(args, quiet()) == 0
    recipe = store.describe(tmp_path / "stored").recipe
    assert recipe.objective == "whitened" and recipe.format.key_bits == 4
    restored = store.restore(tmp_path / "stored", PARAMS, CFG)
    assert isinstance(jax.tree.leaves(restored)[0], jax.Array)
    rows = [json.loads(l) for l in (tmp_path / "out/records.jsonl").read_text().splitlines()]
    retrieval = [r["result"] for r in rows if r["sample"].startswith("retrieval")]
    assert len(retrieval) == 2 and all(r["answer_nll"] > 0 for r in retrieval)
    with pytest.raises(FlagError, match="stored exists"):
        palu.main(args, quiet())


@pytest.mark.slow
def test_a_budget_is_planned_and_kept(folder, tmp_path, capsys):
    args = arguments(folder, tmp_path / "out", keep=(), budget=(0.3, 40), rank_multiple=2)
    assert palu.main(args, Console(width=150)) == 0
    assert "planned for 40 B, gradient → groups of" in capsys.readouterr().out
    rows = [json.loads(l) for l in (tmp_path / "out/records.jsonl").read_text().splitlines()]
    dense, *planned = rows
    limits = 0.3 * dense["bf16_bytes_per_token"], 40
    for row, limit in zip(planned, limits, strict=True):
        assert 0.5 * limit < row["result"]["cache_bytes_per_token"] <= limit
        assert row["group"] in (1, 2) and row["key_bits"] in (2, 3, 4, 8, 16)
    again = PaluRun(args, quiet(), tmp_path / "out")
    again.open()
    again.measure()
    assert len(again.records) == 3  # found again, nothing is measured twice


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(keep=(), budget=(-1,)), FlagError, "--budget is -1"),
        (dict(keep=(), budget=(5,)), rank.RankError, "no ranks fit 5 bytes a token"),
        (dict(slowest=100.0), FlagError, "--slowest limits what --budget chooses"),
        (dict(context=4096), ConfigError, "--context is 4096"),
        (dict(granularity=("G",)), ConvertError, "G-LRD with 2 kv heads"),
        (dict(evaluation="nothing"), corpora.CorpusError, "neither a corpus"),
        (dict(keep=(1.5,)), FlagError, "--keep is 1.5"),
    ],
)
def test_impossible_settings(folder, tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        palu.main(arguments(folder, tmp_path / "out", **changes), quiet())


def test_the_grid_of_the_paper_has_no_doubles():
    cfg = dataclasses.replace(CFG, heads=6, kv_heads=3)
    methods = methods_of(Palu(preset="paper"), cfg)
    names = [m.name for m in methods]
    assert len(set(names)) == len(names) > 60
    for word in ("J 2 bit, whitened, unrotated", "M 3 bit, whitened", "G 16 bit, aware", "kivi2"):
        assert any(word in name for name in names)
    assert set(RIVALS) <= set(names)


def test_the_retrieval_prompt_ends_where_the_value_begins():
    class Bytes:
        encode = staticmethod(lambda text: list(text.encode()))

    record = dict(pairs=[("a", "1"), ("b", "22")], key="b", value="22")
    prompt, answer = evaluate.retrieval_prompt(Bytes(), record)
    assert bytes(answer) == b"22" and bytes(prompt).endswith(b'Corresponding value: "')
