"""The commands on a model that is converted: `experiments.convert`, and residuals that stream."""

import json
from types import SimpleNamespace

import pytest
import tiny_experts
from command import BASE, CFG, call

from experiments import convert
from subspec_jax import sources
from subspec_jax.residual.files import Converted


@pytest.fixture(scope="module")
def residual(run, tmp_path_factory):
    """A run that converts the model in another process, and streams its residuals."""
    root = tmp_path_factory.mktemp("residual")
    flags = f"--stream residual --converted {root / 'model'} --check-lossless"
    found = run(f"{flags} --compare chain subspec-post vanilla ngram", root / "run")
    return SimpleNamespace(root=root, flags=flags, **vars(found))


@pytest.mark.slow
def test_residuals_stream_and_the_text_is_that_of_plain_layers(residual):
    """vanilla and ngram have no substitutes: their layers stream as they are."""
    plain = residual.by_method["vanilla"]
    for name in ("subspec", "chain", "subspec-post"):
        record = residual.by_method[name]
        assert record["lossless"]["identical"] and record["token_ids"] == plain["token_ids"]
        moved = record["rounds"]["streamed_bytes"][0]
        assert 0 < moved < 0.75 * plain["rounds"]["streamed_bytes"][0]
    assert residual.by_method["ngram"]["token_ids"] == plain["token_ids"]
    assert "Converting to" in residual.out and "residuals resident, 2 streamed" in residual.out
    meta = json.loads((residual.folder / "run.json").read_text())
    assert {"substitutes", "streaming ring"} <= set(meta["plans"]["subspec"]["device"])
    assert "substitutes" not in meta["plans"]["vanilla"]["device"]


@pytest.mark.slow
def test_a_converted_model_is_used_again(run, residual, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "subprocess", None)  # which would convert
    again = run(f"{residual.flags} --verify-weights --compare", tmp_path)
    tokens = residual.by_method["subspec"]["token_ids"]
    assert again.by_method["subspec"]["token_ids"] == tokens
    assert "Converting" not in again.out


@pytest.mark.slow
def test_random_residuals_are_timed_with_the_published_acceptance(run, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "find_model", lambda name: SimpleNamespace(config=CFG))
    flags = "--weights random --stream residual --replay-acceptance published --compare vanilla"
    found = run(f"{flags} --draft-head-bits 4 --predict yes", tmp_path, None)
    predicted = json.loads((tmp_path / "run.json").read_text())["predicted_s"]
    assert set(predicted) == {"subspec", "vanilla"}
    for name, parts in predicted.items():
        assert parts["round"] > 3 * parts["block"] > 0
        assert (parts["draft"] > 0) != (name == "vanilla")
        assert f"{name}: {1e3 * parts['round']:.1f} ms a round were predicted" in found.out
    assert found.by_method["subspec"]["replayed"]
    bytes_of = lambda name: found.by_method[name]["rounds"]["streamed_bytes"][0]
    assert 0 < bytes_of("subspec") < bytes_of("vanilla")


@pytest.mark.slow
def test_without_a_limit_one_is_emulated_that_every_method_can_keep(run, tmp_path):
    flags = "--memory-limit auto --resident None --check-lossless"
    found = run(f"{flags} --compare subspec-unshared-layers", tmp_path)
    assert "The whole model fits here. A limit of" in found.out
    meta = json.loads((tmp_path / "run.json").read_text())
    assert all(p["total"] <= meta["memory_limit"] for p in meta["plans"].values())
    assert meta["plans"]["subspec-unshared-layers"]["streamed_bytes"] > 0


def converting(flags: str) -> SimpleNamespace:
    return call(flags, convert.cli)


@pytest.mark.slow
def test_what_was_begun_otherwise_is_not_touched(models, residual):
    folder = residual.root / "model"
    before = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
    flags = f"--checkpoint {models['target']} --to {folder}"
    found = converting(f"{flags} --draft-group 32")
    assert found.code == 2 and "was converted otherwise: group is 16" in found.err
    found = converting(f"{flags} --draft-group 16")
    assert found.code == 0 and "bits a weight to stream" in found.out
    assert {f: f.stat().st_mtime_ns for f in folder.iterdir()} == before
    found = call(f"{BASE} --checkpoint {models['gguf']} {residual.flags} --output {folder}-run")
    assert found.code == 2 and "was converted otherwise: source is" in found.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--checkpoint {truncated} --to {to} --draft-group 16", "truncated"),
        ("--checkpoint {target} --to {to} --draft-group 40", "not a multiple of group 40"),
        ("--checkpoint {target} --to {gguf} --draft-group 16", "File exists"),
    ],
)
def test_what_cannot_be_converted_gets_one_line(models, tmp_path, flags, message):
    found = converting(flags.format(to=tmp_path / "out", **models))
    assert found.code == 2 and found.err.startswith("error: ") and message in found.err
    assert "Traceback" not in found.err


@pytest.mark.slow
def test_experts_of_a_checkpoint_stream_as_residuals(run, tmp_path):
    """Converted by its command, then used by another one, with the text of plain decoding."""
    source, folder = (
        tiny_experts.write(tmp_path / "source")[0],
        tmp_path / "to",
    )
    made = converting(f"--checkpoint {source} --to {folder} --draft-group 16")
    assert made.code == 0, made.err
    # two layers of six experts; one of q, k, v, o and an MLP
    assert convert.split_weights(Converted(folder).cfg) == 2 * 6 * 3 * 64 * 32 + 64 * (
        192 + 3 * 128
    )
    assert "bits a weight to stream" in made.out and "GB for all experts in place of" in made.out
    flags = f"--stream residual --converted {folder} --dtype bfloat16 --verify-weights"
    flags += " --check-lossless --compare chain --resident None --memory-limit 4MB"
    found = run(flags, tmp_path / "run", source)
    plain = found.by_method["vanilla"]
    for name in ("subspec", "chain"):
        record = found.by_method[name]
        assert record["lossless"]["identical"] and record["token_ids"] == plain["token_ids"]
        assert any(map(any, record["rounds"]["experts_needed"]))
    assert "Converting" not in found.out and "12 of 12 experts kept" in found.out
    whole = run(f"{flags} --experts all --compare", tmp_path / "all", source)
    assert whole.by_method["subspec"]["token_ids"] == plain["token_ids"]
    damaged = folder / "layer-00002.safetensors"
    raw = bytearray(damaged.read_bytes())
    raw[len(raw) // 2] ^= 1
    damaged.write_bytes(raw)
    refused = call(f"{BASE} --checkpoint {source} --output {tmp_path / 'no'} {flags}")
    assert refused.code == 2 and f"{damaged} is damaged" in refused.err.replace("\n", " ")
