"""Experts of checkpoints as substitutes and residuals: the bits, damage, stopping, loading."""

import dataclasses
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_experts
from test_residual_file import damage

from llm_jax import LLMError
from llm_jax.checkpoint import Checkpoint
from llm_jax.config import Experts as ExpertSizes
from llm_jax.formats import open_checkpoint
from llm_jax.packed import packed
from llm_jax.params import Experts
from llm_jax.quantize import quantize
from llm_jax.testing import tiny_config, tiny_params, write_safetensors
from pallas_kernels.residual_decode import residual_decode
from pallas_kernels.residual_decode.code import LANES
from subspec_jax.draft_model import Draft, make_draft
from subspec_jax.layout import expert_bytes
from subspec_jax.load import all_on_device, load_target
from subspec_jax.offload import streamed_bytes
from subspec_jax.plan import make_plan
from subspec_jax.random_weights import random_target
from subspec_jax.residual import convert as residual_convert
from subspec_jax.residual import tensor_file as residual_file
from subspec_jax.residual.convert import convert
from subspec_jax.residual.files import Converted
from subspec_jax.residual.split import Split, SplitExperts
from subspec_jax.residual.stacks import decoded_experts
from subspec_jax.residual.tensor_file import ResidualError
from subspec_jax.sources import Source, add_converted
from subspec_jax.tree import TreeSpec

GROUP = 16
SPEC, DRAFT = TreeSpec("beam", 3, 2), Draft(4, GROUP)
CASES = {  # name -> (family, layers without experts)
    "qwen3-mixed": ("qwen3_moe", (1,)),
    "qwen3": ("qwen3_moe", ()),
    "qwen2-shared": ("qwen2_moe", (0,)),
    "mixtral": ("mixtral", ()),
}
LAYERS = 3


def bits(a):
    return np.ascontiguousarray(a).view(np.uint16)


def files_of(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(family, layers without experts, the file's tensors, the checkpoint, the converted model)."""
    family, dense = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    source, found = tiny_experts.write(folder / "source", family, LAYERS, dense)
    checkpoint = open_checkpoint(source)
    cfg = checkpoint.config("bfloat16")
    heard = []
    told = lambda done, total: heard.append((done, total))
    model = convert(checkpoint, cfg, folder / "out", group=GROUP, progress=told)
    assert heard == [(i + 1, LAYERS) for i in range(LAYERS)]
    yield family, dense, found, checkpoint, model
    jax.clear_caches()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """(a checkpoint whose layer 1 has no experts, converted)."""
    folder = tmp_path_factory.mktemp("original")
    checkpoint = open_checkpoint(tiny_experts.write(folder / "source")[0])
    cfg = checkpoint.config("bfloat16")
    return checkpoint, convert(checkpoint, cfg, folder / "out", group=GROUP)


@pytest.fixture
def copy(original, tmp_path):
    """A copy that may be damaged."""
    shutil.copytree(original[1].path, tmp_path / "copy")
    return Converted(tmp_path / "copy")


def plan_of(model, draft=DRAFT, hot=None, **options):
    plan = make_plan(
        model.cfg, 2**30, SPEC, draft, max_length=64, chunk=16, model=model.model, **options
    )
    return plan if hot is None else dataclasses.replace(plan, hot=hot)


@pytest.mark.quick_cases("qwen3-mixed", "qwen2-shared")
def test_experts_decode_to_the_bits_of_the_file(case):
    """Against the tensors as they were written, put together in NumPy."""
    family, dense, found, checkpoint, model = case
    kinds = set()
    for index in range(LAYERS):
        layer = model.layer(index)
        if index in dense:
            assert isinstance(layer.mlp.gate_up, Split)
            continue
        w = layer.mlp.expert_gate_up
        assert isinstance(w, SplitExperts) and layer.mlp.expert_down is None
        kinds.add((str(jax.tree.structure(w)), tuple(a.shape for a in jax.tree.leaves(w))))
        for number in range(tiny_experts.EXPERTS):
            want = tiny_experts.matrices(found, family, index, number)
            both = w.matrices(jnp.asarray(w.each[number]), jnp.int32(number))
            for got, exact in zip(both, want, strict=True):
                decoded = jax.jit(residual_decode)(got.residual, got.substitute)
                np.testing.assert_array_equal(bits(decoded), bits(exact))
                low = packed(quantize(jnp.asarray(exact), 4, GROUP, 20))
                chex.assert_trees_all_equal(got.substitute, low)
        stacks = decoded_experts(w)
        for number in range(tiny_experts.EXPERTS):
            for stack, exact in zip(stacks, tiny_experts.matrices(found, family, index, number)):
                np.testing.assert_array_equal(bits(stack[number]), bits(exact))
        rest = dataclasses.replace(layer.mlp, expert_gate_up=None)
        plain = checkpoint.layer(index, model.cfg)
        chex.assert_trees_all_equal((layer.attn, layer.attn_norm, layer.mlp_norm),
                                    (plain.attn, plain.attn_norm, plain.mlp_norm))  # fmt: skip
        assert (rest.shared is None) == (family != "qwen2_moe")
        without = dict(expert_gate_up=None, expert_down=None)
        chex.assert_trees_all_equal(rest, dataclasses.replace(plain.mlp, **without))
    assert len(kinds) == 1  # one program for the experts of all layers


@pytest.mark.quick_cases("qwen3-mixed")
def test_shapes_are_known_from_the_headers(case):
    model = Converted(case[-1].path)
    for index, shapes in enumerate(model.model.layers):
        chex.assert_trees_all_equal_shapes_and_dtypes(shapes, model.layer(index))


def test_residuals_have_own_lengths_in_the_file(original):
    """Experts of other sizes need other numbers of words; only what is loaded is padded."""
    _, model = original
    file = residual_file.TensorFile(model.path / "layer-00000.safetensors", model.manifest)
    rows = [file.entries[name]["rows"] for name in ("expert_gate_up", "expert_down")]
    stored = [file.views[f"{n}.residual"].shape for n in ("expert_gate_up", "expert_down")]
    assert stored == [(sum(own), LANES) for own in rows]
    assert all(len(set(own)) > 1 for own in rows)
    w = model.layer(0).mlp.expert_gate_up
    every = [
        residual_file.TensorFile(model.path / f"layer-0000{i}.safetensors", model.manifest).entries
        for i in (0, 2)
    ]
    most = lambda name, what: max(n for entries in every for n in entries[name][what])
    assert w.rows == most("expert_gate_up", "rows")
    assert w.each[0].shape[0] == w.rows + most("expert_down", "rows")
    assert w.patches == tuple(most(n, "patches") for n in ("expert_gate_up", "expert_down"))


# Loading.


@pytest.mark.quick_cases("qwen3-mixed-False")
@pytest.mark.parametrize("verify", [False, True])
def test_what_is_loaded_is_the_model(case, verify):
    *_, checkpoint, model = case
    plan, seen = plan_of(model, hot=3), []
    target = load_target(model, plan, seen.append, verify)
    assert seen == [1, 2, 3] and target.experts.capacity == 3
    draft = make_draft(target.params, plan.draft)
    for layer, low, plain in zip(
        target.params.layers, draft.layers, checkpoint.load(model.cfg).layers, strict=True
    ):
        if not isinstance(layer.mlp, Experts):
            continue
        w = layer.mlp.expert_gate_up
        assert low.mlp.expert_gate_up is w.gate_up and low.mlp.expert_down is w.down
        assert {a.sharding.memory_kind for a in w.each} == {"pinned_host"}
        assert sum(a.nbytes for a in w.each) == streamed_bytes(layer)
        assert all(a.nbytes == expert_bytes(plan) for a in w.each)
        stay = jax.tree.leaves(dataclasses.replace(layer, mlp=dataclasses.replace(
            layer.mlp, expert_gate_up=dataclasses.replace(w, each=()))))  # fmt: skip
        assert {a.sharding.memory_kind for a in stay} == {"device"}
        host = dataclasses.replace(w, each=tuple(map(np.asarray, w.each)))
        both = plain.mlp.expert_gate_up, plain.mlp.expert_down
        for got, want in zip(decoded_experts(host), both, strict=True):
            np.testing.assert_array_equal(bits(got), bits(want))


@pytest.mark.quick_cases("qwen3-mixed")
def test_plain_layers_are_put_together_where_the_plan_has_them(case):
    *_, checkpoint, model = case
    plan = make_plan(model.cfg, 2**30, SPEC, DRAFT, max_length=64, resident=LAYERS)
    target = load_target(model, plan, verify=True)
    chex.assert_trees_all_equal(all_on_device(target.params), checkpoint.load(model.cfg))


# Stopping and going on.


class Killed(Exception):
    pass


@pytest.mark.quick_cases("1")
@pytest.mark.parametrize("at", range(LAYERS + 1))
def test_a_killed_conversion_goes_on(original, tmp_path, monkeypatch, at):
    checkpoint, model = original
    written = []

    def write(file, *given):
        if len(written) == at:
            raise Killed
        written.append(file)
        residual_file.write_tensors(file, *given)

    monkeypatch.setattr(residual_convert, "write_tensors", write)
    with pytest.raises(Killed):
        convert(checkpoint, model.cfg, tmp_path / "out", group=GROUP)
    monkeypatch.undo()
    with pytest.raises(ResidualError, match="is missing: the conversion was interrupted; run it a"):
        Converted(tmp_path / "out")
    before = {file: file.stat().st_ino for file in written}
    convert(checkpoint, model.cfg, tmp_path / "out", group=GROUP)
    assert {file: file.stat().st_ino for file in written} == before
    assert files_of(tmp_path / "out") == files_of(model.path)
    monkeypatch.setattr(residual_convert, "write_tensors", None)  # nothing is left to write
    convert(checkpoint, model.cfg, tmp_path / "out", group=GROUP)


def test_a_decoder_that_errs_is_caught(original, tmp_path, monkeypatch):
    checkpoint, model = original
    right = residual_convert._decode

    def wrong(r, q):
        w = right(r, q)
        return w.at[0, 0].set(7) if r.shape == (tiny_experts.NARROW, tiny_experts.D) else w

    monkeypatch.setattr(residual_convert, "_decode", wrong)
    words = r"expert_down of expert \d of layer 0: 1 of 2048 weights decode to other bits"
    with pytest.raises(ResidualError, match=words):
        convert(checkpoint, model.cfg, tmp_path, group=GROUP)
    assert not list(tmp_path.glob("layer-*"))


def test_another_checkpoint_is_refused(copy, tmp_path):
    other = open_checkpoint(tiny_experts.write(tmp_path / "other", seed=1)[0])
    with pytest.raises(ResidualError, match=r"was converted otherwise: source is .* asked for is"):
        convert(other, copy.cfg, copy.path, group=GROUP)


# Damage.


@pytest.mark.parametrize(
    "tensor, at, field",
    [
        ("expert_gate_up.residual", None, r"expert_gate_up of expert \d"),
        ("expert_down.residual", 4 * 32, "expert_down of expert 0"),  # octaves of the first
        ("expert_gate_up.codes", 0, "expert_gate_up of expert 0"),
        ("expert_down.codes", None, "expert_down of expert 3"),
        ("router", None, "router"),
        ("q", 0, "q"),
        ("mlp_norm", 0, "mlp_norm"),
    ],
)
def test_a_wrong_byte_is_found(copy, tensor, at, field):
    """When the file is checked, and, where that is left out, in the decoded weights."""
    file = copy.path / "layer-00002.safetensors"
    damage(file, tensor, at)
    damaged, plan = Converted(copy.path), plan_of(copy, hot=3)
    with pytest.raises(ResidualError, match=rf"{file} is damaged: {tensor} differ from what was"):
        load_target(damaged, plan)
    load_target(damaged, plan, check=False)
    with pytest.raises(ResidualError, match=rf"{file}: {field} differ from the model that was con"):
        load_target(damaged, plan, verify=True, check=False)


@pytest.mark.quick_cases("0")
@pytest.mark.parametrize("part", range(4))
def test_no_flipped_bit_is_silent(original, tmp_path, part):
    folder = tmp_path / "copy"
    shutil.copytree(original[1].path, folder)
    files = [file for file in sorted(folder.iterdir()) if file.name != "layer-00001.safetensors"]
    rng = np.random.default_rng(part)

    def loaded():
        model = Converted(folder)
        for index in (None, *range(LAYERS)):
            model.check(index)
        return jax.tree.map(np.array, [model.layer(0), model.layer(2)]), model.manifest

    want, manifest = loaded()
    silent = 0
    for n in range(25):  # every other one in a header or the manifest
        file = files[rng.choice(len(files))]
        whole = file.read_bytes()
        raw = bytearray(whole)
        raw[rng.integers(len(raw) if n % 2 == 0 else min(len(raw), 3000))] ^= 1 << rng.integers(8)
        file.write_bytes(raw)
        try:
            got, again = loaded()
        except ResidualError as error:
            assert str(file) in str(error) or file.name == "manifest.json"
        else:
            silent += 1
            chex.assert_trees_all_equal(got, want)
            assert again == manifest
        file.write_bytes(whole)
    assert silent < 5  # spaces between what is read


def test_layers_that_changed_their_names_are_refused(copy):
    one, two = (copy.path / f"layer-0000{i}.safetensors" for i in (0, 2))
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)
    with pytest.raises(
        ResidualError, match=r"layer-00000.*is of another layer or another converted"
    ):
        Converted(copy.path)
    two.unlink()
    with pytest.raises(ResidualError, match="layer-0000"):
        Converted(copy.path)


# What cannot be converted.


def test_what_cannot_be_converted(original, tmp_path, monkeypatch):
    checkpoint, model = original
    with pytest.raises(ResidualError, match="experts have no code planes, because each is one arr"):
        convert(checkpoint, model.cfg, tmp_path / "out", group=GROUP, code="planes")
    with pytest.raises(LLMError, match="expert_down has 32 inputs, not a multiple of group 64"):
        convert(checkpoint, model.cfg, tmp_path / "out")
    # tests/llm_jax/test_lowbit_reference.py has a real one
    monkeypatch.setattr(Checkpoint, "experts_in_mxfp4", lambda self, cfg: True)
    words = "the experts are stored in MXFP4, .* would be larger: --stream raw brings them"
    with pytest.raises(ResidualError, match=words):
        convert(checkpoint, model.cfg, tmp_path / "out", group=GROUP)
    with pytest.raises(ResidualError, match=words):
        add_converted(Source("some", model.cfg, checkpoint), DRAFT, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dense_files_are_as_before(original, tmp_path):
    """A layer without experts has the bytes, in the same tensors, that it has in a dense model."""
    _, model = original
    cfg = tiny_config("qwen3", layers=1, dtype="bfloat16", d_ff=128)
    source = write_safetensors(tmp_path / "dense", tiny_params(cfg), cfg, tokenizer=False)
    dense = convert(open_checkpoint(source), cfg, tmp_path / "out", group=GROUP)
    of = lambda path, m: residual_file.TensorFile(path, m.manifest)
    one = of(dense.path / "layer-00000.safetensors", dense)
    two = of(model.path / "layer-00001.safetensors", model)
    assert set(one.views) == set(two.views)
    keys = lambda file: {name: sorted(entry) for name, entry in file.entries.items()}
    assert keys(one) == keys(two)
    assert dense.manifest["version"] == model.manifest["version"] == 6


# Random weights.


@pytest.mark.parametrize("dense", [(1, 2), (0,), (0, 2)])
def test_random_layers_have_the_shapes_of_their_own_kind(dense):
    """No layer with experts is copied to one without, nor the other way round."""
    sizes = ExpertSizes(count=4, chosen=2, d_ff=32, dense_layers=dense)
    cfg = tiny_config("qwen3", layers=3, dtype="bfloat16", d_ff=128, experts=sizes)
    source = Source("random", cfg, residual=True)
    shapes = source.shapes(DRAFT)
    plan = make_plan(cfg, 2**30, SPEC, DRAFT, max_length=64, model=shapes)
    for target in (random_target(plan), source.load(plan)):
        for i, (layer, like) in enumerate(zip(target.params.layers, shapes.layers, strict=True)):
            assert isinstance(layer.mlp, Experts) == (i not in dense)
            chex.assert_trees_all_equal_shapes_and_dtypes(layer, like)
