"""Weights lie where the plan wants them, stay the same bits on the way, and are all committed."""

import dataclasses
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from placement import is_offloaded

from llm_jax.formats import open_checkpoint
from llm_jax.linear import linear
from llm_jax.params import abstract, unjoined
from llm_jax.quantize import QuantizedTable
from llm_jax.stream import to_device
from llm_jax.testing import tiny_config, tiny_params, write_gguf, write_safetensors
from pallas_kernels.quantized_matmul import Packed
from subspec_jax.draft_model import NO_DRAFT, Draft, make_draft, substitutes
from subspec_jax.load import all_on_device, arrange, load_target
from subspec_jax.plan import make_plan
from subspec_jax.random_weights import random_target
from subspec_jax.residual.convert import convert
from subspec_jax.residual.files import Converted
from subspec_jax.residual.split import (
    decode_layer,
    gaussian_room,
    split_head_shapes,
    split_shapes,
)
from subspec_jax.residual.tensor_file import ResidualError
from subspec_jax.sources import Source
from subspec_jax.tree import TreeSpec

CFG = tiny_config("qwen2", layers=4)
TIED = tiny_config("llama", layers=4, tied=True)
SPEC = TreeSpec("beam", 3, 2)
PLACES = [(0, False), (0, True), (1, False), (3, True), (4, False), (4, True)]


def plan_for(cfg=CFG, resident=1, table_on_host=False, draft=None, ahead=1):
    draft = draft or Draft(4, 32)
    return make_plan(
        cfg,
        2**30,
        SPEC,
        draft,
        max_length=64,
        chunk=16,
        ahead=ahead,
        resident=resident,
        table_on_host=table_on_host,
    )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The same model as a folder and as a file; and one with a tied head."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "folder": write_safetensors(folder / "folder", tiny_params(CFG), CFG, shards=2),
        "gguf": write_gguf(folder / "file.gguf", tiny_params(CFG), CFG),
        "tied": write_safetensors(folder / "tied", tiny_params(TIED, 1), TIED),
    }


def pointers(params) -> list:
    """Addresses of all buffers, host tables included."""
    address = lambda a: a.ctypes.data if isinstance(a, np.ndarray) else a.unsafe_buffer_pointer()
    return [address(a) for a in jax.tree.leaves(params)]


def check_places(params, plan):
    """Only the matrices of the streamed layers are on the host, and every array is committed."""
    for i, layer in enumerate(params.layers):
        for a in jax.tree.leaves(layer):
            streamed = a.ndim == 2 and i >= plan.resident
            assert a.sharding.memory_kind == ("pinned_host" if streamed else "device")
    tables = [params.norm] + ([] if plan.cfg.tied else [params.head_DV])
    if plan.table_on_host:
        assert type(params.embed_VD) is np.ndarray
    else:
        tables.append(params.embed_VD)
    assert {a.sharding.memory_kind for a in tables} == {"device"}
    leaves = [a for a in jax.tree.leaves(params) if isinstance(a, jax.Array)]
    assert all(a.committed for a in leaves)


@pytest.mark.quick_cases("0-False-folder", "3-True-gguf")
@pytest.mark.parametrize("format", ["folder", "gguf"])
@pytest.mark.parametrize(("resident", "on_host"), PLACES)
def test_a_checkpoint_is_placed_as_planned(checkpoints, resident, on_host, format):
    plan, seen = plan_for(resident=resident, table_on_host=on_host, ahead=2), []
    target = load_target(open_checkpoint(checkpoints[format]), plan, seen.append)
    check_places(target.params, plan)
    chex.assert_trees_all_equal(all_on_device(target.params), tiny_params(CFG))
    assert (target.cfg, target.ahead) == (CFG, 2)
    assert seen == [1, 2, 3, 4]


def test_a_tied_checkpoint_has_no_head_and_its_table_on_the_device(checkpoints):
    plan = plan_for(TIED, 2)
    target = load_target(open_checkpoint(checkpoints["tied"]), plan)
    check_places(target.params, plan)
    assert target.params.head_DV is None
    assert target.top.embed_VD is target.params.embed_VD


@pytest.mark.parametrize("cfg", [CFG, TIED, dataclasses.replace(CFG, dtype="bfloat16")])
@pytest.mark.parametrize(("resident", "on_host"), PLACES)
def test_random_weights_are_placed_as_planned(cfg, resident, on_host):
    plan = plan_for(cfg, resident, on_host and not cfg.tied)
    target = random_target(plan, seed=3)
    check_places(target.params, plan)
    chex.assert_trees_all_equal_shapes_and_dtypes(all_on_device(target.params), abstract(cfg))


def test_random_weights_depend_on_the_seed_and_not_on_the_place():
    one, other = (
        all_on_device(random_target(plan_for(resident=r, table_on_host=h), seed=3).params)
        for r, h in [(0, False), (3, True)]
    )
    chex.assert_trees_all_equal(one, other)
    changed = random_target(plan_for(), seed=4).params
    assert not np.array_equal(np.asarray(one.embed_VD), np.asarray(changed.embed_VD))
    first, second = one.layers[:2]
    assert not np.array_equal(np.asarray(first.mlp.up), np.asarray(second.mlp.up))
    # Scaled so that activations keep their size.
    assert np.std(np.asarray(first.attn.q)) == pytest.approx(CFG.d_model**-0.5, rel=0.1)


@pytest.mark.parametrize("start", PLACES)
@pytest.mark.parametrize("end", PLACES)
def test_a_target_moves_between_plans_and_what_is_in_place_stays(start, end):
    before = plan_for(resident=start[0], table_on_host=start[1])
    after = plan_for(resident=end[0], table_on_host=end[1], ahead=3)
    target = random_target(before)
    kept = all_on_device(target.params)
    moved = arrange(target, after)
    check_places(moved.params, after)
    chex.assert_trees_all_equal(all_on_device(moved.params), kept)
    assert moved.ahead == 3
    for i, (old, new) in enumerate(zip(target.params.layers, moved.params.layers, strict=True)):
        vectors = [(a, b) for a, b in zip(*map(jax.tree.leaves, (old, new))) if a.ndim == 1]
        assert all(pointers(a) == pointers(b) for a, b in vectors)
        if (i < start[0]) == (i < end[0]):
            assert pointers(old) == pointers(new)
    same_table = pointers(target.params.embed_VD) == pointers(moved.params.embed_VD)
    assert same_table or start[1] != end[1]
    assert pointers(moved.params.head_DV) == pointers(target.params.head_DV)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("on_host", [True, False])
def test_a_draft_shares_all_but_the_layers_it_replaces(on_host, share):
    plan = plan_for(resident=2, table_on_host=on_host, draft=Draft(4, 32, share_resident=share))
    target, seen = random_target(plan), []
    draft = make_draft(target.params, plan.draft, plan.resident, iterations=0, progress=seen.append)
    assert all(a.committed for a in jax.tree.leaves(draft))
    assert {a.sharding.memory_kind for a in jax.tree.leaves(draft)} == {"device"}
    assert seen == [1, 2, 3, 4]
    for i, (own, exact) in enumerate(zip(draft.layers, target.params.layers, strict=True)):
        if share and i < 2:
            assert own is exact
            continue
        for name in ("attn_norm", "mlp_norm"):
            assert getattr(own, name) is getattr(exact, name)
        biases = (exact.attn.q_bias, exact.attn.k_bias, exact.attn.v_bias)
        np.testing.assert_array_equal(own.attn.qkv_bias, np.concatenate(biases))
        matrices = (own.attn.qkv, own.attn.o, own.mlp.gate_up, own.mlp.down)
        assert own.mlp.gate_up_bias is None and own.mlp.down_bias is None
        assert all(type(w) is Packed and (w.bits, w.group) == (4, 32) for w in matrices)
    assert draft.norm is target.params.norm and draft.head_DV is target.params.head_DV
    if on_host:
        assert type(draft.embed_VD) is QuantizedTable
        assert (draft.embed_VD.rows_DV.bits, draft.embed_VD.rows_DV.group) == (4, 32)
    else:
        assert draft.embed_VD is target.params.embed_VD


@pytest.mark.slow
def test_more_iterations_bring_substitutes_nearer():
    plan = plan_for(resident=0, draft=Draft(3, 32))
    target = random_target(plan)
    eye = jnp.eye(CFG.d_model)
    mlp = target.params.layers[0].mlp
    w = np.concatenate((np.asarray(mlp.gate), np.asarray(mlp.up)), axis=-1)
    errors = [
        np.abs(
            np.asarray(
                linear(
                    make_draft(target.params, plan.draft, plan.resident, n).layers[0].mlp.gate_up,
                    eye,
                )
            )
            - w
        ).mean()
        for n in (0, 20)
    ]
    assert errors[1] < errors[0]


def test_a_plan_without_substitutes_has_no_draft():
    plan = plan_for(draft=NO_DRAFT)
    with pytest.raises(ValueError, match="no substitutes"):
        make_draft(random_target(plan).params, plan.draft)


def test_fetched_parameters_run_without_a_stream(checkpoints):
    target = load_target(open_checkpoint(checkpoints["folder"]), plan_for(table_on_host=True))
    params = all_on_device(target.params)
    assert {a.sharding.memory_kind for a in jax.tree.leaves(params)} == {"device"}
    assert all(a.committed for a in jax.tree.leaves(params))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """(the checkpoint, the same model as substitutes and residuals)."""
    folder, cfg = tmp_path_factory.mktemp("converted"), dataclasses.replace(CFG, dtype="bfloat16")
    source = open_checkpoint(write_safetensors(folder / "source", tiny_params(cfg), cfg))
    return source, convert(source, cfg, folder / "out", group=32, iterations=0)


@pytest.mark.slow
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize(
    ("resident", "on_host", "split"),
    [(0, False, False), (3, True, False), (4, False, False), (3, True, True)],
)
def test_a_converted_model_is_placed_as_planned(converted, resident, on_host, split, verify):
    source, model = converted
    options = dict(max_length=64, chunk=16, resident=resident, table_on_host=on_host)
    options |= dict(model=model.model_with_split_head if split else model.model)
    plan = make_plan(model.cfg, 2**30, SPEC, Draft(4, 32), **options)
    seen = []
    target = load_target(model, plan, seen.append, verify)
    assert seen == [1, 2, 3, 4]
    assert isinstance(target.params.embed_VD, np.ndarray) == on_host
    draft = make_draft(target.params, plan.draft, plan.resident)
    assert {a.sharding.memory_kind for a in jax.tree.leaves(draft)} == {"device"}
    leaves = [a for a in jax.tree.leaves((target.params, draft)) if isinstance(a, jax.Array)]
    assert all(a.committed for a in leaves)
    for i, layer in enumerate(target.params.layers):
        assert is_offloaded(layer) == (i not in plan.stays)
        assert pointers(draft.layers[i]) == pointers(substitutes(layer))
        whole = unjoined(jax.jit(decode_layer)(to_device(layer)), model.cfg)
        chex.assert_trees_all_equal(whole, source.load(model.cfg).layers[i])
    head = target.params.head_DV
    if split:
        assert pointers(draft.head_DV) == pointers(head.substitute)
        head = jax.jit(decode_layer)(head)[:, : model.cfg.vocab]
    np.testing.assert_array_equal(head, source.load(model.cfg).head_DV)


@pytest.mark.slow
def test_a_converted_model_is_put_together_where_the_plan_has_plain_layers(converted):
    source, model = converted
    plan = plan_for(model.cfg, resident=2, table_on_host=True)
    target = load_target(model, plan)
    check_places(target.params, plan)
    chex.assert_trees_all_equal(all_on_device(target.params), source.load(model.cfg))


@pytest.mark.slow
def test_a_plan_of_residuals_needs_a_converted_model(converted):
    source, model = converted
    plan = make_plan(model.cfg, 2**30, SPEC, Draft(4, 32), max_length=64, model=model.model)
    with pytest.raises(ValueError, match="convert the checkpoint first"):
        load_target(source, plan)


@pytest.mark.quick_cases("model")
@pytest.mark.parametrize("name", ["layer-00002", "model"])
def test_damage_is_found_unless_nothing_is_checked(converted, tmp_path, name):
    """In the bytes of the files, or, where that was left out, in the decoded weights."""
    _, model = converted
    shutil.copytree(model.path, tmp_path / "copy")
    file = tmp_path / "copy" / f"{name}.safetensors"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    damaged = Converted(tmp_path / "copy")
    plan = make_plan(model.cfg, 2**30, SPEC, Draft(4, 32), max_length=64, model=damaged.model)
    with pytest.raises(ResidualError, match=rf"{name}.safetensors is damaged: [\w.]+ differ from"):
        load_target(damaged, plan)
    load_target(damaged, plan, check=False)
    with pytest.raises(ResidualError, match=rf"{name}.safetensors: \w+ differ from the model"):
        load_target(damaged, plan, verify=True, check=False)


@pytest.mark.slow
def test_a_random_head_in_two_parts():
    cfg = dataclasses.replace(CFG, dtype="bfloat16", d_model=128)
    room = gaussian_room(cfg, 4, 32)
    layers = (split_shapes(cfg, 4, 32, room),) * 4
    head = split_head_shapes(cfg, 4, 32, room["head"])
    model = dataclasses.replace(abstract(cfg), layers=layers, head_DV=head)
    plan = make_plan(cfg, 2**30, SPEC, Draft(4, 32, 4), max_length=64, model=model)
    target = random_target(plan)
    chex.assert_trees_all_equal_shapes_and_dtypes(target.params.head_DV, head)
    assert (
        make_draft(target.params, plan.draft, plan.resident).head_DV
        is target.params.head_DV.substitute
    )
    whole = np.asarray(jax.jit(decode_layer)(target.params.head_DV), np.float32)
    assert np.std(whole) == pytest.approx(128**-0.5, rel=0.1)


def test_random_residuals_attend_as_their_layers_do():
    """One layer is encoded and copied; what is static is each layer's own."""
    kinds = ("sliding", "full", "sliding")
    cfg = dataclasses.replace(CFG, dtype="bfloat16", layers=3, layer_kinds=kinds, window=8)
    draft = Draft(4, 32)
    shapes = Source("random", cfg, residual=True).shapes(draft)
    plan = make_plan(cfg, 2**30, SPEC, draft, max_length=64, model=shapes)
    assert tuple(layer.attn.kind for layer in plan.model.layers) == kinds
    target = random_target(plan)
    assert tuple(layer.attn.kind for layer in target.params.layers) == kinds
