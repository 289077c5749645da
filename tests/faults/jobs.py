"""Long work that must survive kill -9: each job, run again in the same folder, ends the same.

Imported once by a server that forks a process for each try, because importing JAX takes longer than
the work.
"""

import contextlib
import functools
import json
import os
from pathlib import Path

import jax
import numpy as np

from experiments.speculative import __main__ as speculative
from llm_jax.checkpoint import table_shapes
from llm_jax.formats import open_checkpoint
from llm_jax.params import abstract
from llm_jax.testing import tiny_config, tiny_params, write_safetensors
from palu_jax import store
from palu_jax.calibration import calibrate
from palu_jax.convert import Recipe, to_palu
from palu_jax.format import LatentFormat
from palu_jax.rank import group_sizes, uniform_ranks
from qyolop_jax.config import ModelConfig
from qyolop_jax.network import INTEGER_FILE, MODEL_FILE, load
from qyolop_jax.recipe import Training, four_stages
from qyolop_jax.scenes import Scenes
from qyolop_jax.stages import Phase, Stage, Variables
from qyolop_jax.training import fit
from subspec_jax import stored
from subspec_jax.residual.convert import convert as convert_model

CFG = tiny_config("qwen2", layers=3, d_model=32, d_ff=64)


@functools.cache
def model(folder: Path) -> Path:
    """A tiny model beside the folder, written by the first job that needs it."""
    path = folder.parent / "model"
    if not (path / "generation_config.json").exists():  # which is written last
        write_safetensors(path, tiny_params(CFG), CFG)
    return path


def convert(folder: Path) -> None:
    checkpoint = open_checkpoint(model(folder))
    convert_model(checkpoint, checkpoint.config("bfloat16"), folder, group=16, iterations=2)


def store_layers(folder: Path) -> None:
    """Writes the layers as they are read from disk while decoding."""
    checkpoint = open_checkpoint(model(folder))
    tables = lambda: {field: checkpoint.read(field, CFG) for field in table_shapes(CFG)}
    stored.store(folder, "tiny", abstract(CFG), tables, lambda i: checkpoint.layer(i, CFG))


def speculate(folder: Path) -> None:
    flags = f"--checkpoint {model(folder)} --output {folder} --samples 4 --max-new-tokens 6"
    flags += " --depth 2 --width 2 --draft-group 16 --max-length 192 --chunk 64 --resident 1"
    flags += " --memory-limit 16MB --no-show --compare vanilla"
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        status = speculative.cli(flags.split())
    assert status == 0


def compress(folder: Path) -> None:
    """Calibrates, converts and stores, as `experiments.palu --save` does."""
    folder.mkdir(exist_ok=True)
    params, rng = tiny_params(CFG), np.random.default_rng(0)
    text = [rng.integers(0, CFG.vocab, (2, 24)) for _ in range(6)]
    found = calibrate(params, text, CFG, path=folder / "statistics.npz", every_s=0)
    sizes = group_sizes(CFG.kv_heads, 2)
    ranks = uniform_ranks(CFG.layers, sizes, CFG.head_dim, 0.5)
    recipe = Recipe(sizes, ranks, "gradient", LatentFormat(4, 4))
    if not (folder / "store").exists():
        made = to_palu(params, CFG, recipe, found)
        store.save(folder / "store", made, CFG, recipe, "tiny")


def regress(folder: Path) -> None:
    """The four stages of Q-YOLOP's training, on a regression in place of the network."""
    from test_training import Numbers, begin, loss

    stages = [Stage(name, 2, 4, 0.05, 0.01) for name in ("pretrain", "mosaic", "finetune", "qat")]
    feed = lambda number: lambda mosaic: Numbers(10 * number + mosaic)
    phases = [Phase(s, loss, begin, feed(i), per_epoch=3) for i, s in enumerate(stages)]
    keep(folder, fit(folder, phases, save_every=2))


def train(folder: Path) -> None:
    """The four stages on the smallest network: all its layers, one cell, two steps a stage."""
    cfg = ModelConfig(0.01, "relu", size=(32, 32))
    stages = four_stages((1, 1, 1, 1), batch=2, rate=1e-3)
    training = Training(folder, {"scenes": Scenes(4, (64, 64))}, cfg, stages)
    variables = training.run(save_every=1)
    training.network(variables)
    keep(folder, variables)


def keep(folder: Path, variables: Variables) -> None:
    kept = {jax.tree_util.keystr(p): np.asarray(a) for p, a in jax.tree.leaves_with_path(variables)}
    np.savez(folder / "variables.npz", **kept)


def made_by(job: str, folder: Path):
    """What a job that ended has made, without times and names that differ from run to run."""
    if job in ("convert", "store_layers"):
        return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    if job == "speculate":
        rows = map(json.loads, (folder / "records.jsonl").read_text().splitlines())
        return sorted((r["method"], r["sample"], r["turn"], tuple(r["token_ids"])) for r in rows)
    if job == "compress":
        restored = store.restore(folder / "store", tiny_params(CFG), CFG)
        return [np.asarray(a).tobytes() for a in jax.tree.leaves(restored)]
    found = np.load(folder / "variables.npz")
    if job == "regress":  # another process may add in another order
        return {name: np.round(found[name].astype(np.float64), 5).tolist() for name in found.files}
    networks = [load(folder / name).values for name in (MODEL_FILE, INTEGER_FILE)]
    logged = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [
        {name: found[name].tobytes() for name in found.files},
        [np.asarray(a).tobytes() for a in jax.tree.leaves(networks)],
        [{k: v for k, v in r.items() if k != "images_per_second"} for r in logged],
    ]
