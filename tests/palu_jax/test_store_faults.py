"""Stored conversions that were damaged, or are put where they do not belong."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.formats import open_checkpoint
from llm_jax.testing import tiny_config, tiny_params, write_safetensors
from palu_jax import description, store
from palu_jax.convert import Recipe, to_palu
from palu_jax.format import LatentFormat
from palu_jax.store import StoreError

CFG = tiny_config("qwen2")
PARAMS = tiny_params(CFG)
RANKS = (((8, 6), (12, 4)), ((16, 16), (5, 7)))
RECIPE = Recipe((1, 1), RANKS, "plain", LatentFormat(4, 2, sinks=3, clip=(1.0, 0.8)))
PALU = to_palu(PARAMS, CFG, RECIPE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "palu"
    store.save(folder, PALU, CFG, RECIPE, "tiny")
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def read_or_named(folder):
    """Whether reading was refused by name; what is read otherwise is what was written."""
    try:
        back = store.restore(folder, PARAMS, CFG)
    except StoreError as error:
        assert "\n" not in str(error)
        return True
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(PALU), strict=True):
        np.testing.assert_array_equal(a, b)
    return False


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_named(copy, count):
    """Each file gets its share; in JSON, white space may become other white space."""
    rng, every, silent = (
        np.random.default_rng(count),
        [p for p in files(copy) if p.stat().st_size],
        [],
    )
    for i in range(count):
        path = every[i % len(every)]
        before = path.read_bytes()
        at, broken = rng.integers(len(before)), bytearray(before)
        broken[at] ^= 1 << rng.integers(8)
        path.write_bytes(broken)
        if not read_or_named(copy):
            silent.append((path.name, bytes(before[at : at + 1]), bytes(broken[at : at + 1])))
        path.write_bytes(before)
    assert all(name == store.NAME and not (a + b).strip() for name, a, b in silent), silent
    assert not read_or_named(copy)


def test_truncated_and_missing_files_are_named(copy):
    for path in files(copy):
        before = path.read_bytes()
        for size in {0, len(before) // 2, max(len(before) - 1, 0)} - {len(before)}:
            path.write_bytes(before[:size])
            assert read_or_named(copy), (path, size)
        path.unlink()
        assert read_or_named(copy), path
        path.write_bytes(before)
    assert not read_or_named(copy)


def test_files_of_another_store_are_named(copy, tmp_path):
    other = to_palu(tiny_params(CFG, 3), CFG, RECIPE)
    store.save(tmp_path / "other", other, CFG, RECIPE, "tiny")
    shutil.rmtree(copy / "factors")
    shutil.copytree(tmp_path / "other" / "factors", copy / "factors")
    assert read_or_named(copy)


def edited(folder, change, sign):
    """Changes palu.json; `sign` writes the checksum anew, as a program that forges it would."""
    path = folder / store.NAME
    found = json.loads(path.read_text())
    change(found)
    if sign:
        found["checksum"] = description._checksum(found)
    path.write_text(json.dumps(found))


EDITS = {
    "a smaller rank": lambda j: j["recipe"]["ranks"][0].__setitem__(0, [4, 6]),
    "a larger rank": lambda j: j["recipe"]["ranks"][0].__setitem__(0, [16, 6]),
    "one rank for two groups": lambda j: j["recipe"]["ranks"][0].__setitem__(0, [8]),
    "a rank of 0": lambda j: j["recipe"]["ranks"][0].__setitem__(0, [0, 6]),
    "a rank that is a float": lambda j: j["recipe"]["ranks"][0].__setitem__(0, [8.0, 6]),
    "a rank that is true": lambda j: j["recipe"]["ranks"][0].__setitem__(0, [True, 6]),
    "a rank beyond 64 bits": lambda j: j["recipe"]["ranks"][0].__setitem__(0, [10**30, 6]),
    "ranks that are text": lambda j: j["recipe"].update(ranks="8"),
    "no layers": lambda j: j["recipe"].update(ranks=[]),
    "keys alone": lambda j: j["recipe"]["ranks"][0].pop(),
    "groups": lambda j: j["recipe"].update(groups=[2]),
    "no groups": lambda j: j["recipe"].update(groups=[]),
    "groups that are a number": lambda j: j["recipe"].update(groups=2),
    "an objective": lambda j: j["recipe"].update(objective="best"),
    "a mean split": lambda j: j["recipe"].update(mean_split=True),
    "fused values": lambda j: j["recipe"].update(fuse_values=True),
    "rotate as text": lambda j: j["recipe"].update(rotate="false"),
    "no format": lambda j: j["recipe"].update(format=None),
    "5 bits": lambda j: j["recipe"]["format"].update(key_bits=5),
    "bits that are a float": lambda j: j["recipe"]["format"].update(key_bits=4.0),
    "blocks": lambda j: j["recipe"]["format"].update(block=5),
    "negative sinks": lambda j: j["recipe"]["format"].update(sinks=-1),
    "too many sinks": lambda j: j["recipe"]["format"].update(sinks=2**40),
    "a window of nothing": lambda j: j["recipe"]["format"].update(window=None),
    "clip": lambda j: j["recipe"]["format"].update(clip=[2.0]),
    "clip of NaN": lambda j: j["recipe"]["format"].update(clip=[float("nan")]),
    "a dtype": lambda j: j["recipe"]["format"].update(dtype="float7"),
    "an unknown field": lambda j: j["recipe"].update(more=1),
    "a missing field": lambda j: j["recipe"].pop("rotate"),
    "layers": lambda j: j["config"].update(layers=10**9),
    "kv heads": lambda j: j["config"].update(kv_heads=3),
    "a width": lambda j: j["config"].update(d_model="64"),
    "a rope": lambda j: j["config"].update(rope_scaling=[]),
    "no config": lambda j: j.update(config=None),
    "files": lambda j: j.update(files=[]),
    "no files": lambda j: j.update(files={}),
    "a file elsewhere": lambda j: j["files"].update({"../palu.json": "0" * 32}),
    "a digest": lambda j: j["files"].update({k: "0" for k in j["files"]}),
    "no base": lambda j: j.update(base={}),
    "a base without digests": lambda j: j["base"].update(digests={}),
    "a source": lambda j: j.update(source=7),
    "a version": lambda j: j.update(version=3),
    "no checksum": lambda j: j.pop("checksum"),
}


@pytest.mark.parametrize("sign", [False, True], ids=["as it is", "signed"])
@pytest.mark.parametrize("what", EDITS)
def test_wrong_descriptions_are_named(copy, what, sign):
    edited(copy, EDITS[what], sign and what != "no checksum")
    assert read_or_named(copy)


def test_numbers_that_only_the_checksum_protects(copy):
    """A window or more bits would read as another conversion without a word."""
    for name, value in (("key_bits", 8), ("window", 5)):
        before = (copy / store.NAME).read_text()
        edited(copy, lambda j, n=name, v=value: j["recipe"]["format"].update({n: v}), False)
        with pytest.raises(StoreError, match="was changed: its checksum does not fit"):
            store.describe(copy)
        found = store.restore(copy, PARAMS, CFG, verify=False)
        assert getattr(found.layers[0].attn.format, name) == value
        (copy / store.NAME).write_text(before)


def test_what_is_no_file_is_named(copy):
    (copy / store.NAME).unlink()
    os.mkfifo(copy / store.NAME)  # reading it would wait for ever
    with pytest.raises(StoreError, match=r"has no palu\.json"):
        store.describe(copy)
    (copy / store.NAME).unlink()
    (copy / store.NAME).mkdir()
    with pytest.raises(StoreError, match=r"has no palu\.json"):
        store.describe(copy)


def one_number(name, layer=1, kept=True):
    """The plain parameters with one number changed, in one tensor."""
    change = lambda a: a.at[(-1,) * a.ndim].add(1e-3)
    if hasattr(PARAMS, name):
        return dataclasses.replace(PARAMS, **{name: change(getattr(PARAMS, name))})
    one = PARAMS.layers[layer]
    for part in (one.attn, one.mlp, one):
        if hasattr(part, name):
            new = dataclasses.replace(part, **{name: change(getattr(part, name))})
    if not isinstance(new, type(one)):
        new = dataclasses.replace(one, **{"mlp" if hasattr(new, "gate") else "attn": new})
    layers = (*PARAMS.layers[:layer], new, *PARAMS.layers[layer + 1 :])
    return dataclasses.replace(PARAMS, layers=layers)


KEPT = ("q", "o", "q_bias", "k_bias", "v_bias", "gate", "up", "down", "attn_norm", "mlp_norm")


@pytest.mark.parametrize("name", [*KEPT, "embed_VD", "norm", "head_DV"])
def test_a_base_that_differs_in_one_number_is_refused(whole, tmp_path, name):
    other = one_number(name)
    with pytest.raises(StoreError, match=f"made from other weights than these .*{name}"):
        store.restore(whole, other, CFG)
    back = store.restore(whole, other, CFG, verify=False)
    np.testing.assert_array_equal(back.layers[1].attn.k.down_DR, PALU.layers[1].attn.k.down_DR)
    if name in ("up", "head_DV"):  # and where the base is read from a checkpoint
        write_safetensors(tmp_path / "other", other, CFG, tokenizer=False)
        base, stored = open_checkpoint(tmp_path / "other"), store.describe(whole)
        with pytest.raises(StoreError, match=f"made from other weights than .*{name}"):
            store.PaluCheckpoint(base, stored).load(CFG)
        store.PaluCheckpoint(base, stored, verify=False).load(CFG)


def test_a_converted_model_is_known_by_its_base_and_its_factors(whole, tmp_path):
    """Runs that are resumed compare these."""
    found = []
    for n, params in enumerate((PARAMS, one_number("down"))):
        base = open_checkpoint(write_safetensors(tmp_path / str(n), params, CFG))
        other = dataclasses.replace(RECIPE, format=LatentFormat(8, 8))
        store.save(tmp_path / f"{n}-8", to_palu(params, CFG, other), CFG, other, "tiny")
        for folder in (whole, tmp_path / f"{n}-8"):
            seen = store.PaluCheckpoint(base, store.describe(folder))
            assert seen.digest() == store.PaluCheckpoint(base, store.describe(folder)).digest()
            found += [seen.digest(), seen.identity()]
        found += [base.digest(), base.identity()]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("made", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("used", ["float32", "bfloat16", "float16"])
def test_a_base_in_another_dtype_is_the_same_base(tmp_path, made, used):
    """The checkpoint is in bfloat16, as most are."""
    source = jax.tree.map(lambda a: a.astype("bfloat16"), PARAMS)
    cast = lambda dtype: jax.tree.map(lambda a: a.astype(dtype), source)
    cfg = dataclasses.replace(CFG, dtype=made)
    store.save(tmp_path / "x", to_palu(cast(made), cfg, RECIPE), cfg, RECIPE, "tiny")
    cfg = dataclasses.replace(CFG, dtype=used)
    assert store.restore(tmp_path / "x", cast(used), cfg).layers[0].attn.k.down_DR.dtype == used
    other = jax.tree.map(lambda a: a.astype(used), one_number("up"))
    other = jax.tree.map(lambda a: a.at[(0,) * a.ndim].add(jnp.asarray(0.1, used)), other)
    with pytest.raises(StoreError, match="other weights"):
        store.restore(tmp_path / "x", other, cfg)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(format=LatentFormat(2, 2)), "another recipe: its format"),
        (dict(format=dataclasses.replace(RECIPE.format, window=4)), "its format"),
        (dict(ranks=(((8, 6), (12, 4)), ((16, 16), (5, 8)))), "layer 1 .*: its ranks"),
        (dict(ranks=RANKS[::-1]), "layer 0 .*: its ranks"),
        (dict(groups=(2,), ranks=(((14,), (16,)),) * 2), "layer 0 .*: its ranks"),
        (dict(mean_split=True), "its arrays"),
        (dict(ranks=RANKS[:1]), "ranks for 1 layers; the model has 2"),
        (dict(groups=(2, 1)), "do not add up"),
    ],
    ids=str,
)
def test_saving_with_another_recipe_is_refused(tmp_path, change, words):
    with pytest.raises(StoreError, match=words):
        store.save(tmp_path / "x", PALU, CFG, dataclasses.replace(RECIPE, **change), "tiny")
    assert not list(tmp_path.iterdir())


def test_saving_what_does_not_fit_is_refused(tmp_path):
    recipe = Recipe((2,), (((8,), (12,)),) * 2, "plain")
    with pytest.raises(StoreError, match="its arrays"):
        fused = dataclasses.replace(recipe, fuse_values=True)
        store.save(tmp_path / "x", to_palu(PARAMS, CFG, recipe), CFG, fused, "tiny")
    with pytest.raises(StoreError, match=r"its arrays .*float32.*bfloat16"):
        store.save(tmp_path / "x", PALU, dataclasses.replace(CFG, dtype="bfloat16"), RECIPE, "tiny")
    one = dataclasses.replace(PALU, layers=PALU.layers[:1])
    with pytest.raises(StoreError, match="has 1 layers, its config 2"):
        store.save(tmp_path / "x", one, CFG, RECIPE, "tiny")
    bad = PALU.layers[1].attn
    bad = dataclasses.replace(bad, k=dataclasses.replace(bad.k, down_DR=bad.k.down_DR * jnp.nan))
    layers = (PALU.layers[0], dataclasses.replace(PALU.layers[1], attn=bad))
    with pytest.raises(StoreError, match="layer 1: k_down holds NaN"):
        store.save(tmp_path / "x", dataclasses.replace(PALU, layers=layers), CFG, RECIPE, "tiny")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file/x cannot be written"):
        store.save(tmp_path / "file" / "x", PALU, CFG, RECIPE, "tiny")
