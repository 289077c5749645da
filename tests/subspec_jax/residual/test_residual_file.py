"""Converting, stopping half-way, going on, loading, and noticing what is broken."""

import dataclasses
import itertools
import json
import shutil

import chex
import jax
import numpy as np
import pytest

from llm_jax import CheckpointError
from llm_jax.formats import open_checkpoint
from llm_jax.packed import packed
from llm_jax.params import unjoined
from llm_jax.quantize import quantize
from llm_jax.stream import to_device
from llm_jax.testing import tiny_config, tiny_params, write_gguf, write_safetensors
from subspec_jax.draft_model import substitute_layer, substitutes
from subspec_jax.offload import offload, streamed_bytes
from subspec_jax.residual import convert as residual_convert
from subspec_jax.residual import split as residual_device
from subspec_jax.residual import tensor_file as residual_file
from subspec_jax.residual.convert import convert
from subspec_jax.residual.files import Converted, partition
from subspec_jax.residual.tensor_file import ResidualError

CFG = tiny_config("qwen2", layers=3, dtype="bfloat16", d_ff=128)
GROUP = 32
decode_layer = jax.jit(residual_device.decode_layer)


def bits(a):
    return np.ascontiguousarray(a).view(np.uint16)


def low(w, iterations=20):
    return packed(quantize(w, 4, GROUP, iterations))


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    return open_checkpoint(write_safetensors(folder, tiny_params(CFG), CFG, tokenizer=False))


@pytest.fixture(scope="module")
def original(source, tmp_path_factory):
    return convert(source, CFG, tmp_path_factory.mktemp("converted"), group=GROUP)


@pytest.fixture
def converted(original, tmp_path):
    """A copy that may be damaged."""
    shutil.copytree(original.path, tmp_path / "copy")
    return Converted(tmp_path / "copy", kinds=1)


def decoded(model, index):
    return decode_layer(model.layer(index))


def plain(layer):
    return unjoined(layer, CFG)


@pytest.mark.quick_cases("levels-bfloat16")
@pytest.mark.parametrize("code, dtype", [("levels", "bfloat16"), ("planes", "float16")])
def test_a_converted_model_is_the_model(source, tmp_path, code, dtype):
    cfg, heard = dataclasses.replace(CFG, dtype=dtype), []
    model = convert(
        source, cfg, tmp_path, 4, GROUP, 5, code, lambda done, total: heard.append((done, total))
    )
    assert heard == [(1, 3), (2, 3), (3, 3)]
    model = Converted(tmp_path, kinds=1)
    assert model.cfg == cfg
    want = source.load(cfg)
    for index, layer in enumerate(want.layers):
        got = decoded(model, index)
        assert_same(plain(got), layer)
        model.verify(index, got)
        assert_same(model.layer(index).mlp.down.substitute, low(layer.mlp.down, 5))
    for name, table in model.tables.items():
        np.testing.assert_array_equal(bits(table), bits(getattr(want, name)))
    assert set(model.tables) == {"embed_VD", "norm"}
    model.verify_tables()
    head = np.asarray(jax.jit(residual_device.decode_layer)(model.head))
    assert head.shape[1] == model.head.substitute.words * 8 == 512
    np.testing.assert_array_equal(bits(head[:, : cfg.vocab]), bits(want.head_DV))
    assert not head[:, cfg.vocab :].any()
    model.verify_head(head[:, : cfg.vocab])
    with pytest.raises(ResidualError, match=r"model.safetensors: head_DV differ from the model"):
        model.verify_head(head[:, 1 : cfg.vocab + 1])


@pytest.mark.slow
def test_gguf_and_scaled_ropes(tmp_path):
    """GGUF keeps q and k of Llama in another order; a tied model has no head."""
    cfg = tiny_config("llama3", layers=1, dtype="bfloat16", tied=True)
    source = open_checkpoint(write_gguf(tmp_path / "model.gguf", tiny_params(cfg), cfg, "Q8_0"))
    cfg = source.config("bfloat16")
    model = convert(source, cfg, tmp_path / "out", group=GROUP)
    assert Converted(tmp_path / "out").cfg == cfg
    assert_same(unjoined(decoded(model, 0), cfg), source.load(cfg).layers[0])
    assert set(model.tables) == {"embed_VD", "norm"} and model.head is None
    assert model.model_with_split_head.head_DV is None


@pytest.mark.slow
def test_layers_stream_from_pinned_memory(source, original):
    """What is loaded is what `subspec_jax.offload` keeps; layers of a kind share their shapes."""
    want = source.load(CFG)
    one = Converted(original.path, kinds=1)
    shapes = {tuple(a.shape for a in jax.tree.leaves(one.layer(i))) for i in range(3)}
    assert len(shapes) == 1
    for index in range(3):
        kept = offload(one.layer(index))
        assert_same(plain(decode_layer(to_device(kept))), want.layers[index])
    own = [
        streamed_bytes(Converted(original.path, kinds).layer(i))
        for kinds in (1, 3)
        for i in range(3)
    ]
    assert sum(own[3:]) <= sum(own[:3])


@pytest.mark.parametrize("kinds", [1, 3])
def test_shapes_are_known_from_the_headers(original, kinds):
    model = Converted(original.path, kinds)
    for index, shapes in enumerate(model.model.layers):
        chex.assert_trees_all_equal_shapes_and_dtypes(shapes, model.layer(index))
    chex.assert_trees_all_equal_shapes_and_dtypes(model.model_with_split_head.head_DV, model.head)
    assert model.model.head_DV.shape == (CFG.d_model, CFG.vocab)


def test_files_are_mapped(original):
    """Views into the files, read when they are used."""
    arrays = jax.tree.leaves(substitutes(original.layer(0))) + list(original.tables.values())
    for array in arrays:
        while not isinstance(array, np.memmap):
            array = array.base
            assert array is not None
        assert not array.flags.writeable


# Stopping and going on.


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_killed_conversion_goes_on(source, original, tmp_path, monkeypatch, at):
    """Killed while it writes file `at`: half of it stays behind, under no file's name."""
    written = []

    def write(file, *given):
        if len(written) == at:
            nobody = 2**22 + 1  # above the largest process number of Linux
            scratch = file.with_name(f".{file.name}.{nobody}.x1")
            scratch.mkdir()
            (scratch / file.name).write_bytes(b"half")
            raise Killed
        written.append(file)
        residual_file.write_tensors(file, *given)

    monkeypatch.setattr(residual_convert, "write_tensors", write)
    with pytest.raises(Killed):
        convert(source, CFG, tmp_path, group=GROUP)
    monkeypatch.undo()
    assert {f.name for f in tmp_path.glob("*.safetensors")} == {f.name for f in written}
    with pytest.raises(ResidualError, match="is missing: the conversion was interrupted; run it a"):
        Converted(tmp_path)
    before = {file: file.stat().st_ino for file in written}
    convert(source, CFG, tmp_path, group=GROUP)
    assert {file: file.stat().st_ino for file in written} == before
    files = lambda folder: {f.name: f.read_bytes() for f in sorted(folder.iterdir())}
    assert files(tmp_path) == files(original.path)


def test_a_complete_conversion_is_not_repeated(source, converted, monkeypatch):
    monkeypatch.setattr(residual_convert, "write_tensors", None)
    convert(source, CFG, converted.path, group=GROUP)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(code="planes"), "code is 'levels', asked for is 'planes'"),
        (dict(bits=3), "bits is 4, asked for is 3"),
        (dict(iterations=1), "iterations is 20, asked for is 1"),
    ],
)
def test_other_settings_are_refused(source, converted, change, message):
    with pytest.raises(ResidualError, match=f"was converted otherwise: {message}. Choose another"):
        convert(source, CFG, converted.path, **dict(group=GROUP) | change)
    with pytest.raises(ResidualError, match=r"'dtype': 'bfloat16'.*'dtype': 'float16'"):
        convert(source, dataclasses.replace(CFG, dtype="float16"), converted.path, group=GROUP)


def test_another_checkpoint_is_refused(converted, tmp_path):
    other = write_safetensors(tmp_path / "other", tiny_params(CFG, 1), CFG, tokenizer=False)
    with pytest.raises(ResidualError, match=r"source is .* asked for is"):
        convert(open_checkpoint(other), CFG, converted.path, group=GROUP)


def test_what_cannot_be_converted(source, tmp_path):
    with pytest.raises(ResidualError, match="float32; residuals are of 16-bit weights: choose --d"):
        convert(source, dataclasses.replace(CFG, dtype="float32"), tmp_path)
    with pytest.raises(ValueError, match="q has 64 inputs, not a multiple of group 48"):
        convert(source, CFG, tmp_path, group=48)
    with pytest.raises(CheckpointError, match=r"layers.3.* is missing"):
        convert(source, dataclasses.replace(CFG, layers=4), tmp_path, group=GROUP)
    with pytest.raises(ResidualError, match="holds other safetensors files; choose an empty"):
        convert(source, CFG, source.path, group=GROUP)
    assert not any(tmp_path.iterdir())


def test_a_decoder_that_errs_is_caught(source, tmp_path, monkeypatch):
    """Every weight is compared before its file appears."""
    right = residual_convert._decode

    def wrong(r, q):
        w = right(r, q)
        return w.at[0, 0].set(7) if r.shape == CFG.joined_matrices["down"] else w

    monkeypatch.setattr(residual_convert, "_decode", wrong)
    expected = "down of layer 0: 1 of 8192 weights decode to other bits"
    with pytest.raises(ResidualError, match=expected):
        convert(source, CFG, tmp_path, group=GROUP)
    assert not list(tmp_path.glob("layer-*"))


# Damage.


def damage(file, name, at=None, flip=0x10):
    """Flips a bit of a tensor in a safetensors file; in the middle by default."""
    raw = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(raw[:8], "little")
    start, stop = json.loads(raw[8:begin])[name]["data_offsets"]
    raw[begin + (start + (stop - start) // 2 if at is None else start + at)] ^= flip
    file.write_bytes(raw)


@pytest.mark.parametrize(
    "tensor, at, field",
    [
        ("gate_up.residual", None, "gate_up"),  # the stream
        ("gate_up.residual", 4 * 128 + 1, "gate_up"),  # the offset of the first tile
        ("gate_up.residual", 4 * 32, "gate_up"),  # octaves
        ("qkv.codes", 0, "qkv"),
        ("o.scale", 0, "o"),  # a step
        ("down.scale", 2, "down"),  # an offset
        ("qkv_bias", None, "qkv_bias"),
        ("mlp_norm", 0, "mlp_norm"),
    ],
)
def test_a_wrong_byte_is_found(converted, tensor, at, field):
    file = converted.path / "layer-00001.safetensors"
    damage(file, tensor, at)
    model = Converted(converted.path, kinds=1)
    model.verify(0, decoded(model, 0))
    with pytest.raises(ResidualError, match=rf"{file}: {field} differ from the model that was"):
        model.verify(1, decoded(model, 1))


def test_a_wrong_byte_in_a_table_is_found(converted):
    damage(converted.path / "model.safetensors", "norm")
    with pytest.raises(ResidualError, match=r"model.safetensors: norm differ"):
        Converted(converted.path).verify_tables()


def test_broken_folders(converted, tmp_path):
    with pytest.raises(ResidualError, match=r"is not a converted model: no manifest.json"):
        Converted(tmp_path)
    file = converted.path / "layer-00002.safetensors"
    whole = file.read_bytes()
    for part in (whole[:-1], whole[:100], b""):
        file.write_bytes(part)
        with pytest.raises(ResidualError, match=f"{file.name} is truncated or damaged"):
            Converted(converted.path)
    file.write_bytes(whole)
    manifest = converted.path / "manifest.json"
    old = {k: v for k, v in json.loads(manifest.read_text()).items() if k != "digest"}
    manifest.write_text(json.dumps(old | {"version": 4}))
    with pytest.raises(ResidualError, match="is of version 4, this program reads 6; convert again"):
        Converted(converted.path)
    (converted.path / "manifest.json").write_text("{")
    with pytest.raises(ResidualError, match=r"manifest.json is damaged"):
        Converted(converted.path)


def test_a_file_of_another_place_is_refused(converted, source, tmp_path):
    """Two layers that changed their names; a layer of another conversion of the same sizes."""
    one, two = (converted.path / f"layer-0000{i}.safetensors" for i in (0, 1))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    with pytest.raises(
        ResidualError, match=r"layer-00000.*is of another layer or another converted"
    ):
        Converted(converted.path)
    other = convert(source, CFG, tmp_path / "other", group=GROUP, iterations=1)
    one.write_bytes((other.path / one.name).read_bytes())
    with pytest.raises(
        ResidualError, match=r"layer-00000.*is of another layer or another converted"
    ):
        Converted(converted.path)
    one.write_bytes(first)
    Converted(converted.path)


@pytest.mark.quick_cases("0")
@pytest.mark.parametrize("part", range(8))
def test_no_flipped_bit_is_silent(original, tmp_path, part):
    """25 flips a part, 200 in all, anywhere in the folder: each is named when it is loaded, or
    nothing that is read has changed."""
    folder = tmp_path / "copy"
    shutil.copytree(original.path, folder)
    files = sorted(folder.iterdir())
    sizes = np.array([file.stat().st_size for file in files])
    rng = np.random.default_rng(part)

    def loaded():
        model = Converted(folder)
        for index in (None, *range(CFG.layers)):
            model.check(index)
        layers = [jax.tree.map(np.asarray, model.layer(i)) for i in range(CFG.layers)]
        return jax.tree.map(np.array, [layers, model.tables, model.head]), model.manifest

    want, manifest = loaded()
    silent = 0
    for n in range(25):  # every other one in a header or the manifest, which are small
        file = files[rng.choice(len(files), p=None if n % 2 else sizes / sizes.sum())]
        raw = bytearray(file.read_bytes())
        at = rng.integers(len(raw) if n % 2 == 0 else min(len(raw), 3000))
        raw[at] ^= 1 << rng.integers(8)
        whole = file.read_bytes()
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


@pytest.mark.parametrize("kinds", [1, 2, 3, 9])
def test_partition_costs_least(kinds):
    """Against all ways to put six layers into groups."""
    rows = np.random.default_rng(kinds).integers(1, 9, (6, 1))

    def cost(groups):
        return sum(len(g) * rows[g].max(0).sum() for g in groups)

    got = partition(rows, kinds)
    assert len(got) <= kinds and sorted(itertools.chain(*got)) == list(range(6))
    ways = itertools.product(range(min(kinds, 6)), repeat=6)
    groups = ([[i for i in range(6) if way[i] == k] for k in set(way)] for way in ways)
    assert cost(got) == min(map(cost, groups))


@pytest.mark.slow
def test_substitutes_are_those_of_the_draft(source, original):
    """What the draft computes with is what the residuals were made against."""
    want = substitute_layer(source.load(CFG).layers[0], 4, GROUP, 20)
    got = substitutes(original.layer(0))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_substitutes(source, tmp_path, bits):
    model = convert(source, CFG, tmp_path, bits, GROUP, 0)
    assert_same(plain(decoded(model, 0)), source.load(CFG).layers[0])
