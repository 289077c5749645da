"""A Colab T4, as far as a CPU can say: float16, no kernels, its memory, and the recipe's table.

The card is emulated by what `subspec_jax.memory` says of it. Nothing here ran on a T4.
"""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import subspec_jax
from llm_jax import CheckpointError
from llm_jax.formats import open_checkpoint
from llm_jax.generation import generate
from llm_jax.quantize import quantize
from llm_jax.testing import tiny_config, tiny_params, write_safetensors
from subspec_jax import limits, memory
from subspec_jax.check import NotFiniteError, compare_with_plain
from subspec_jax.methods import METHOD_NAMES
from subspec_jax.residual.convert import convert
from subspec_jax.residual.encode import encode
from subspec_jax.residual.files import ResidualError
from subspec_jax.residual.split import decode_layer, gaussian_room

ROOT = Path(__file__).parents[2]
CARD, HOST = 15_360 * 2**20, 12.7 * 2**30
CFG = tiny_config("qwen2", layers=4, d_ff=128, dtype="bfloat16")
TREE = subspec_jax.TreeSpec("beam", depth=3, width=2)
SMALL = dict(
    tree=TREE, draft=subspec_jax.Draft(4, 32), max_length=96, chunk=32, resident=1,
    stream="residual",
)  # fmt: skip
NEW = 16
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def on_a_t4(monkeypatch):
    """What this machine is asked about its card; a limit cannot be enforced on a CPU."""
    monkeypatch.setattr(memory, "card_bytes", lambda: CARD)
    monkeypatch.setattr(memory, "card_has_kernels", lambda: False)
    monkeypatch.setattr(memory, "backends_started", lambda: True)
    monkeypatch.setattr(memory, "card_is_idle", lambda: False)
    monkeypatch.setattr(limits, "_free_bytes", lambda *_: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in bfloat16, with numbers at both ends of what float16 holds."""
    made = write_safetensors(tmp_path_factory.mktemp("model"), tiny_params(CFG), CFG)
    file = made / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.gate_proj.weight"][0, :3] = 2.0**-24, 2.0**-20, 2.0**-30
    save_file(tensors, file, metadata={"format": "pt"})
    return made


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
    """The folder that another machine has converted."""
    source = open_checkpoint(folder)
    to = tmp_path_factory.mktemp("converted")
    return convert(source, source.config("float16"), to, 4, 32)


@pytest.fixture(scope="module")
def prompt(folder):
    return open_checkpoint(folder).tokenizer().encode("A thimble holds little, but")


@pytest.fixture(scope="module")
def plain(folder, prompt):
    """What the model writes in float16, by a loop over weights that are all on the device."""
    checkpoint = open_checkpoint(folder)
    cfg = checkpoint.config("float16")
    return generate(checkpoint.load(cfg), prompt, cfg, NEW)


def test_a_converted_folder_has_the_bits_of_float16(folder, converted):
    """Those that NumPy rounds to: subnormal numbers stay, and what is too small becomes zero."""
    tensors = load_file(folder / "model.safetensors")
    decode, prefix = jax.jit(decode_layer), "model.layers.1."
    layer = decode(converted.layer(1))
    gate = tensors[prefix + "mlp.gate_proj.weight"].astype(np.float16).T
    up = tensors[UP].astype(np.float16).T
    down = tensors[prefix + "mlp.down_proj.weight"].astype(np.float16).T
    assert gate[:3, 0].tolist() == [2.0**-24, 2.0**-20, 0.0]
    got = [np.asarray(a) for a in (layer.mlp.gate_up, layer.mlp.down)]
    for a, want in zip(got, (np.concatenate([gate, up], 1), down), strict=True):
        np.testing.assert_array_equal(a.view(np.uint16), want.view(np.uint16))


def test_a_folder_in_bfloat16_is_refused(folder, tmp_path):
    source = open_checkpoint(folder)
    convert(source, source.config("bfloat16"), tmp_path, 4, 32)
    with pytest.raises(ResidualError, match=r"'dtype': 'bfloat16'.*'dtype': 'float16'"):
        subspec_jax.open(folder, "64MB", converted=tmp_path, **SMALL)


METHODS = [name for name in METHOD_NAMES if name not in ("classic", "subspec-lossy")]


@pytest.mark.quick_cases("subspec")
@pytest.mark.parametrize("name", METHODS)
def test_every_method_writes_the_text_of_float16(folder, converted, prompt, plain, name):
    """Up to near-ties, as in all 16-bit types."""
    given = dict(SMALL, method=name, converted=converted.path)
    with subspec_jax.open(folder, "64MB", **given) as model:
        assert model.cfg.dtype == "float16"
        residual = model.plan.draft.bits is not None
        assert model.plan.streams_residuals == residual and model.plan.streamed == 3
        tokens = model.generate(prompt, NEW, eos=())
        found = compare_with_plain(model.target, prompt, tokens, plain)
        assert found["identical"] or abs(found["logit_gap"]) <= found["tolerance"]
        assert len(tokens) == NEW


def test_weights_beyond_float16_are_named(folder, tmp_path):
    """When layers are read, and when they are converted."""
    there = tmp_path / "model"
    there.mkdir()
    for file in folder.iterdir():
        (there / file.name).write_bytes(file.read_bytes())
    tensors = load_file(there / "model.safetensors")
    tensors[UP][3, 4] = 70_000
    save_file(tensors, there / "model.safetensors", metadata={"format": "pt"})
    message = f"{re.escape(UP)} has numbers beyond float16"
    with (
        subspec_jax.open(there, "64MB", **dict(SMALL, stream="raw")) as model,
        pytest.raises(CheckpointError, match=message),
    ):
        model.load()
    source = open_checkpoint(there)
    with pytest.raises(CheckpointError, match=message):
        convert(source, source.config("float16"), tmp_path / "to", 4, 32)


def test_activations_beyond_float16_are_named(folder, tmp_path, prompt):
    """Weights that fit, and products that do not: the layer is named, no token is emitted."""
    there = tmp_path / "model"
    there.mkdir()
    for file in folder.iterdir():
        (there / file.name).write_bytes(file.read_bytes())
    tensors = load_file(there / "model.safetensors")
    for name in (UP, UP.replace("up", "down")):
        tensors[name] = (tensors[name].astype(np.float32) * 3e3).astype(tensors[name].dtype)
    save_file(tensors, there / "model.safetensors", metadata={"format": "pt"})
    with subspec_jax.open(there, "64MB", converted=tmp_path / "to", **SMALL) as model:
        words = (
            r"in layer 1, after \d+ tokens; .* do not fit into float16: take bfloat16 or float32"
        )
        with pytest.raises(NotFiniteError, match=words):
            model.generate(prompt, NEW)


@pytest.mark.slow
def test_no_triton_is_needed(folder, converted):
    """With Pallas out of reach, in another process."""
    program = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("jax.experimental.pallas"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Blocked())
import subspec_jax
from subspec_jax import TreeSpec, Draft
given = dict(tree=TreeSpec(depth=3, width=2), draft=Draft(4, 32), max_length=96, resident=1)
given |= dict(stream="residual", dtype="float16", converted={str(converted.path)!r})
with subspec_jax.open({str(folder)!r}, "64MB", **given) as model:
    print(len(model.generate([5, 6, 7], 8, eos=())), model.plan.streamed)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["8", "3"]


SEVEN = dict(weights="random", max_length=2048)
PLANS = {  # the first words of a row of docs/colab.md -> how it is opened
    "plain, chunks of 128": dict(method="vanilla", chunk=128),
    "plain, chunks of 512": dict(method="vanilla"),
    "SubSpec, raw layers": dict(chunk=128),
    "SubSpec, residuals": dict(chunk=128, stream="residual"),
    "SubSpec, raw layers, in 10 GB": dict(chunk=128, memory="10GB"),
    "SubSpec, residuals, in 10 GB": dict(chunk=128, stream="residual", memory="10GB"),
}


@pytest.mark.parametrize("row", PLANS)
def test_the_recipes_table_is_what_the_planner_says(row):
    given = dict(memory="14GB", tree=subspec_jax.TreeSpec(depth=24, width=4)) | PLANS[row]
    draft = subspec_jax.Draft(4, 64, head_bits=4)
    plan = subspec_jax.open("qwen2.5-7b", draft=draft, **SEVEN, **given).plan
    assert plan.cfg.dtype == "float16" and plan.total <= plan.limit
    host = sum(plan.host.values())
    assert host < HOST
    sizes = [f"{count / 2**30:.1f}" for count in (plan.total, host, plan.streamed_bytes)]
    cells = [sizes[0], f"{plan.resident} of {plan.cfg.layers}", sizes[1], sizes[2]]
    assert f"| {row} | {' | '.join(cells)} |" in (ROOT / "docs" / "colab.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("octave", [4.0, 4.4, 4.8])
def test_random_layers_of_float16_fit_into_their_room(bits, octave):
    """Also those of a bfloat16 checkpoint: the code does not see that three bits are zero."""

    cfg = tiny_config("qwen2", dtype="float16", d_model=256, d_ff=512)
    words, patches = gaussian_room(cfg, bits, 64)["down"]
    w = jax.random.normal(jax.random.key(0), (512, 256)) * 2.0**-octave
    for dtype in ("float16", "bfloat16"):
        a = w.astype(dtype).astype(jnp.float16)
        low = jax.tree.map(np.asarray, quantize(a, bits, 64, 0))
        found = encode(np.asarray(a), low, "levels")
        assert found.words.shape[0] <= words and found.patches <= patches
        assert found.words.shape[0] > 0.85 * words
