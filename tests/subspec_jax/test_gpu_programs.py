"""The programs that a GPU will run, as Triton IR and StableHLO, made without one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from llm_jax.attention import caches_for
from llm_jax.packed import packed
from llm_jax.params import Params, abstract
from llm_jax.quantize import QuantizedTable, quantize
from llm_jax.registry import MODELS
from llm_jax.sample import Sampler
from pallas_kernels import device
from pallas_kernels.lowering import lower_for
from pallas_kernels.tree_attention.tiles import cut
from subspec_jax.draft import Drafting, grow
from subspec_jax.draft_model import substitutes
from subspec_jax.residual.split import gaussian_room, split_head_shapes, split_shapes
from subspec_jax.tree import TreeSpec, cache_slots, seedling
from subspec_jax.verify import Verified, finish_round, jit_block, lay_out

LAYERS = 2
SPEC = TreeSpec("beam", 48, 6)
SLOTS = cache_slots(2048, SPEC)
KERNEL = "__gpu$xla.gpu.triton"


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(device, "on_gpu", lambda: True)


def target(name) -> tuple:
    """(sizes with few layers, the model as shapes, its layers residuals)."""
    cfg = dataclasses.replace(MODELS[name].config, layers=LAYERS, dtype="bfloat16")
    layer = split_shapes(cfg, 4, 64, gaussian_room(cfg, 4, 64))
    return cfg, dataclasses.replace(abstract(cfg), layers=(layer,) * LAYERS)


def drafting(name) -> tuple:
    """(sizes, the draft as shapes: low-bit layers, table and head)."""
    cfg, model = target(name)
    low = lambda w: packed(quantize(w, 4, 64, 0))
    head = jax.eval_shape(low, jax.ShapeDtypeStruct((cfg.d_model, cfg.vocab), cfg.dtype))
    table = jax.eval_shape(lambda t: QuantizedTable(quantize(t.T, 4, 64, 0)), model.embed_VD)
    return cfg, Params(table, tuple(map(substitutes, model.layers)), model.norm, head)


def caches(cfg, model):
    return jax.eval_shape(functools.partial(caches_for, model, cfg, 1, SLOTS, SPEC.places + 1))


NUMBER = jax.ShapeDtypeStruct((), jnp.int32)


@pytest.mark.parametrize("name", ["qwen2.5-7b", "qwen2.5-32b", "llama-3.1-8b"])
def test_a_draft_step_is_kernels(name):
    """Four products, cache, attention and its parts a layer, and the head; no matrix is made dense,
    no scores of all slots are written; the whole tree is one program."""
    cfg, draft = drafting(name)
    tree = jax.eval_shape(lambda: seedling(jnp.int32(0), SPEC))
    key = jax.eval_shape(lambda: jax.random.key(0))
    least = jax.ShapeDtypeStruct((SPEC.steps,), jnp.float32)
    fixed = dict(cfg=cfg, spec=SPEC, sampler=Sampler(), live=1024, least_L=least)
    given = Drafting(draft, tree, caches(cfg, draft), NUMBER, key, **fixed)
    program = lower_for(grow, given)
    assert program.count(KERNEL) == 7 * LAYERS + 1
    for rows, columns in (*cfg.joined_matrices.values(), (cfg.d_model, cfg.vocab)):
        assert f"tensor<{rows}x{columns}xbf16>" not in program
    assert f"x{SLOTS}xf32" not in program and "x1024xf32" not in program


@pytest.mark.parametrize("name", ["qwen2.5-7b", "llama-3.1-8b"])
def test_a_block_of_the_target_decodes_a_part_of_a_matrix_at_a_time(name):
    """gate and up in four parts, down in two; no whole matrix is written, and no scores."""
    cfg, model = target(name)
    tree = jax.eval_shape(lambda: seedling(jnp.int32(0), SPEC))
    _, tokens, step = jax.eval_shape(lambda t: lay_out(t, jnp.int32(0), SPEC, 512), tree)
    x = jax.ShapeDtypeStruct((*tokens.shape, cfg.d_model), cfg.dtype)
    run = lambda *a: jit_block(*a, cfg)
    program = lower_for(run, model.layers[0], x, caches(cfg, model)[0], step)
    *_, parts = cut(SPEC.nodes * cfg.heads // cfg.kv_heads, cfg.kv_heads, 512)
    assert program.count(KERNEL) == 8 + (2 if parts > 1 else 1)
    assert "residual_decode" in program and "tree_attention" in program
    assert f"tensor<{cfg.d_model}x{2 * cfg.d_ff}x" not in program
    assert f"tensor<{cfg.d_model}x{cfg.d_ff // 2}xbf16>" in program
    assert "x512xf32" not in program


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0.8)], ids=["greedy", "sampling"])
@pytest.mark.parametrize("name", ["qwen2.5-7b", "llama-3.1-8b"])
def test_the_head_in_two_parts_is_put_together_a_part_at_a_time(name, sampler):
    """Eight kernels, in which each word is one. A greedy draw never sees a whole row of logits,
    others see those of half of the nodes at a time, with columns added."""
    cfg, model = target(name)
    room = gaussian_room(cfg, 4, 64)
    head = split_head_shapes(cfg, 4, 64, room["head"])
    top = dataclasses.replace(model, embed_VD=None, layers=(), head_DV=head)
    tree = jax.eval_shape(lambda: seedling(jnp.int32(0), SPEC))
    cut, *_ = jax.eval_shape(lambda t: lay_out(t, jnp.int32(0), SPEC, 512), tree)
    x = jax.ShapeDtypeStruct((1, SPEC.nodes, cfg.d_model), cfg.dtype)
    key = jax.eval_shape(lambda: jax.random.key(0))
    fixed = dict(cfg=cfg, spec=SPEC, sampler=sampler, replay=True)
    given = Verified(top, x, cut, tree, caches(cfg, model), NUMBER, key, NUMBER, **fixed)
    program = lower_for(finish_round, given)
    assert program.count(KERNEL) == 8
    columns = head.shape[1]
    assert f"tensor<{cfg.d_model}x{columns}xbf16>" not in program
    assert f"tensor<{cfg.d_model}x{columns // 8}xbf16>" in program
    assert (f"tensor<1x145x{columns}xf32>" in program) == (not sampler.greedy)
    assert f"{SPEC.nodes}x{columns}x" not in program
    assert (f"tensor<{SPEC.nodes}x{columns // 8}xf32>" in program) == sampler.greedy
