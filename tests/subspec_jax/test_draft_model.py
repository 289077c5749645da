"""Substitutes share everything but the matrices of the chosen layers, and need no data."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from placement import is_offloaded

from llm_jax.attention import causal_step
from llm_jax.cache import KV
from llm_jax.config import Config
from llm_jax.int8 import int8
from llm_jax.linear import embedding_rows, linear
from llm_jax.model import block, unembed
from llm_jax.packed import packed
from llm_jax.quantize import QuantizedTable, dequantize, quantize
from llm_jax.testing import tiny_params
from pallas_kernels.quantized_matmul import Packed
from pallas_kernels.quantized_matmul.packing import packed_bytes
from pallas_kernels.quantized_matmul.reference import dequantized
from subspec_jax.draft_model import (
    INT8,
    make_draft,
    substitute,
    substitute_layer,
    substitute_table,
)
from subspec_jax.offload import place

CFG = Config(4, 32, 4, 2, 8, 48, 30, dtype="float32", qkv_bias=True, qk_norm=True)
RESIDENT = 2
MATRICES = {"qkv", "o", "gate_up", "down"}
JOINED = {"qkv": "qkv", "o": "o", "gate_up": ("gate", "up"), "down": ("down",)}


@pytest.fixture(scope="module")
def params():
    whole = tiny_params(CFG)
    return dataclasses.replace(whole, layers=place(whole.layers, RESIDENT))


@pytest.fixture(scope="module")
def draft(params):
    return substitute(params, 4, 16, layers=range(RESIDENT, CFG.layers))


def parts(layer):
    """Fields of a layer by name, biases and norms included."""
    fields = {"attn_norm": layer.attn_norm, "mlp_norm": layer.mlp_norm}
    for owner in (layer.attn, layer.mlp):
        fields |= {f.name: getattr(owner, f.name) for f in dataclasses.fields(owner)}
    return {name: a for name, a in fields.items() if a is not None and name != "kind"}


def same_buffer(a, b):
    return a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer()


@pytest.mark.slow
def test_everything_that_is_not_a_chosen_matrix_is_the_very_same_buffer(params, draft):
    assert same_buffer(draft.embed_VD, params.embed_VD)
    assert same_buffer(draft.head_DV, params.head_DV)
    assert same_buffer(draft.norm, params.norm)
    for i, (ours, theirs) in enumerate(zip(draft.layers, params.layers, strict=True)):
        if i < RESIDENT:
            pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
            assert all(same_buffer(a, b) for a, b in pairs)
            continue
        ours, theirs = parts(ours), parts(theirs)
        assert len(ours) == 4 + 2 + 1 + 2  # matrices, norms, the bias, norms of heads
        biases = [theirs[name] for name in ("q_bias", "k_bias", "v_bias")]
        np.testing.assert_array_equal(ours.pop("qkv_bias"), np.concatenate(biases))
        for name in ours:
            if name in MATRICES:
                assert isinstance(ours[name], Packed)
            else:
                assert same_buffer(ours[name], theirs[name]), name


@pytest.mark.slow
def test_chosen_layers_are_quantized_on_the_device(params, draft):
    layer = draft.layers[RESIDENT]
    assert is_offloaded(params.layers[RESIDENT]) and not is_offloaded(layer)
    assert {a.sharding.memory_kind for a in jax.tree.leaves(layer)} == {"device"}
    dense = jax.tree.map(np.asarray, parts(params.layers[RESIDENT]))
    for name, shape in CFG.joined_matrices.items():
        w = parts(layer)[name]
        assert w.shape == shape and (w.bits, w.group) == (4, 16)
        low = [quantize(jnp.asarray(dense[part]), 4, 16, 20) for part in JOINED[name]]
        chex.assert_trees_all_equal(w, packed(*low))
        exact = np.concatenate([np.asarray(dequantize(q)) for q in low], axis=-1)
        np.testing.assert_array_equal(dequantized(w), exact)
        assert w.size_bytes == packed_bytes(*shape, 4, 16)


def test_no_data_is_needed_and_the_result_is_always_the_same(params, draft):
    again = substitute(params, 4, 16, layers=range(RESIDENT, CFG.layers))
    chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, again.layers), jax.tree.map(np.asarray, draft.layers)
    )


@pytest.mark.parametrize("layers, chosen", [(None, [0, 1, 2, 3]), ([0, 3], [0, 3]), ((), [])])
def test_only_the_chosen_layers_change(params, layers, chosen):
    heard = []
    draft = substitute(params, 8, 16, 0, layers, heard.append)
    kinds = [isinstance(l.mlp.down, Packed) for l in draft.layers]
    assert kinds == [i in chosen for i in range(CFG.layers)]
    for i, layer in enumerate(draft.layers):
        assert (layer is params.layers[i]) == (i not in chosen)
    assert heard == [1, 2, 3, 4]


@pytest.mark.slow
def test_iterations_are_passed_on(params):
    layer = params.layers[0]
    nearest, better = (substitute_layer(layer, 2, 16, n) for n in (0, 20))
    error = lambda l: float(jnp.abs(dequantized(l.mlp.down) - layer.mlp.down).mean())
    assert error(better) < 0.99 * error(nearest)


@pytest.mark.slow
@pytest.mark.parametrize("bits, budget", [(8, 0.01), (4, 0.13), (3, 0.27), (2, 0.6)])
def test_a_substitute_computes_nearly_what_its_layer_does(params, bits, budget):
    layer = params.layers[0]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, CFG.d_model)), jnp.float32)
    one = jax.jit(block, static_argnums=4)
    run = lambda l: one(l, x, KV.empty(CFG, 1, 6), causal_step(0, 6, 6), CFG)[0] - x
    want, got = run(layer), run(substitute_layer(layer, bits, 16))
    off = float(jnp.abs(got - want).mean() / jnp.abs(want).mean())
    assert budget / 4 < off < budget


def test_a_table_on_the_host_is_quantized_along_the_model(params):
    table = np.asarray(params.embed_VD)
    draft = substitute(dataclasses.replace(params, embed_VD=table), 4, 16, layers=())
    assert isinstance(draft.embed_VD, QuantizedTable) and draft.embed_VD.shape == (30, 32)
    chex.assert_trees_all_equal(draft.embed_VD.rows_DV, quantize(jnp.asarray(table.T), 4, 16, 0))
    rows = embedding_rows(draft.embed_VD, jnp.array([3, 29]))
    step = np.asarray(draft.embed_VD.rows_DV.step_QF, np.float32).max()
    assert np.abs(np.asarray(rows) - table[[3, 29]]).max() <= 0.6 * step


@pytest.mark.parametrize("rows", [1, 8192, 2 * 4099])
def test_tables_are_made_in_blocks_of_rows(rows):
    """8198 = 2 x 4099 rows are two blocks; the result is that of one."""
    table = np.random.default_rng(1).normal(size=(rows, 16)).astype(np.float32)
    got = substitute_table(table, 4, 8)
    assert got.shape == (rows, 16)
    chex.assert_trees_all_equal(got.rows_DV, quantize(jnp.asarray(table.T), 4, 8, 0))


@pytest.mark.quick_cases("True")
@pytest.mark.parametrize("tied", [False, True])
def test_a_low_bit_head_of_its_own(params, tied):
    if tied:
        params = dataclasses.replace(params, head_DV=None)
    draft = substitute(params, 4, 16, layers=(), head_bits=8)
    dense = params.embed_VD.T if tied else params.head_DV
    assert draft.head_DV.bits == 8 and draft.embed_VD is params.embed_VD
    np.testing.assert_allclose(dequantized(draft.head_DV), dense, atol=0.02)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, CFG.d_model)), jnp.float32)
    exact = unembed(dataclasses.replace(params, head_DV=dense), x, CFG)
    assert float(jnp.abs(unembed(draft, x, CFG) - exact).max()) < 0.1


def test_logits_of_a_low_bit_head_are_not_rounded_to_16_bits(params):
    """They would tie."""
    head = substitute(params, 4, 16, layers=(), head_bits=8).head_DV
    h = jnp.asarray(np.random.default_rng(0).normal(size=(3, CFG.d_model)), jnp.bfloat16)
    logits = np.asarray(linear(head, h, jnp.float32))
    want = np.asarray(h, np.float32) @ np.asarray(dequantized(head, jnp.bfloat16), np.float32)
    np.testing.assert_allclose(logits, want, atol=1e-5)
    assert (logits != logits.astype(jnp.bfloat16).astype(np.float32)).any()


@pytest.mark.quick_cases("2", "3", "1")
@pytest.mark.parametrize("layer", range(CFG.layers))
def test_shapes_are_those_of_the_substitutes(params, layer):
    exact = params.layers[layer]
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), exact)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        substitute_layer(shapes, 3, 16), substitute_layer(exact, 3, 16)
    )


def test_groups_that_do_not_fit_raise(params):
    with pytest.raises(ValueError, match="not a multiple of group 64; these fit"):
        substitute(params, 4, 64)


@pytest.mark.parametrize("tied", [True, False])
def test_on_a_cpu_every_layer_and_the_head_are_int8(tied):
    """Resident layers too, because their copies are quicker; norms and biases are shared."""
    whole = tiny_params(dataclasses.replace(CFG, tied=tied))
    found = make_draft(whole, INT8, RESIDENT)
    for own, exact in zip(found.layers, whole.layers, strict=True):
        joined = jnp.concatenate([exact.mlp.gate, exact.mlp.up], axis=1)
        chex.assert_trees_all_equal(own.mlp.gate_up, int8(joined))
        chex.assert_trees_all_equal(own.attn.o, int8(exact.attn.o))
        assert same_buffer(own.attn_norm, exact.attn_norm)
    head = whole.embed_VD.T if tied else whole.head_DV
    chex.assert_trees_all_equal(found.head_DV, int8(head))
    assert found.embed_VD is whole.embed_VD


def test_int8_shapes_are_those_of_the_arrays():
    whole = tiny_params(CFG)
    shapes = make_draft(jax.eval_shape(lambda: whole), INT8, RESIDENT)
    alike = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert alike(shapes) == alike(make_draft(whole, INT8, RESIDENT))
