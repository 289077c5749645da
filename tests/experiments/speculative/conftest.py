"""Tiny models on disk, and a function that runs the command on them."""

import dataclasses

import jax
import pytest
from command import BASE, CFG, SMALL, call

from experiments.common import records
from llm_jax.testing import tiny_params, write_gguf, write_safetensors
from subspec_jax import memory


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu():
    """No card is asked for, no limit enforced, and XLA spends no time on speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "card_bytes", lambda: None)
        patch.setenv("COLUMNS", "80")  # of the terminal; what is piped is wider
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders and files by name: a target, drafts with its vocabulary and others, a broken one."""
    root = tmp_path_factory.mktemp("models")
    write = lambda name, cfg: write_safetensors(root / name, tiny_params(cfg), cfg)
    larger, cut = (dataclasses.replace(SMALL, vocab=n) for n in (320, 272))
    found = {
        "target": write("target", CFG),
        "small": write("small", SMALL),
        "larger": write("larger", larger),
        "cut": write("cut", cut),
        "gguf": write_gguf(root / "target.gguf", tiny_params(CFG), CFG),
        "truncated": write("truncated", CFG),
        "truncated-gguf": root / "truncated.gguf",
        "empty": root / "empty",
    }
    weights = found["truncated"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    found["truncated-gguf"].write_bytes(found["gguf"].read_bytes()[:-1000])
    found["empty"].mkdir()
    return found


@pytest.fixture(scope="module")
def run(models):
    """f(flags, folder) -> the finished run, with records by method; the target is the tiny one."""

    def run(flags="", folder=None, checkpoint=models["target"]):
        source = f"--checkpoint {checkpoint}" if checkpoint else ""
        done = call(f"{BASE} {source} --output {folder} {flags}")
        assert (done.code, done.err) == (0, ""), done.err
        done.folder = folder
        done.records = records.read(folder / "records.jsonl")
        done.by_method = {r["method"]: r for r in done.records}
        return done

    return run
