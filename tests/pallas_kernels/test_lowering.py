"""Every named shape becomes Triton IR or Mosaic GPU's, without a GPU."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.device import mosaic_missing
from pallas_kernels.lowering import lower_for
from pallas_kernels.lowrank_attention import lowrank_attention, why_not, why_not_mosaic
from pallas_kernels.lowrank_attention.latents import block_bytes
from pallas_kernels.shapes import LOWRANK, LowrankShape


def attention(shape, implementation="triton"):
    return lambda q, k, v, up_k, up_v, lengths, mask=None, position=None: lowrank_attention(
        q, k, v, up_k, up_v, shape.frequencies, lengths,
        mask_BTS=mask, position_BS=position, implementation=implementation,
    )  # fmt: skip


slow = lambda *case: pytest.param(*case, marks=pytest.mark.slow)
"""One more case of a branch that a quick one takes, too."""
QUICK = ("llama-2-7b", "qwen2.5-7b")  # absorbed queries, and rebuilt keys
MODELS = [name if name in QUICK else slow(name) for name in LOWRANK]


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("name", MODELS)
def test_decoding_lowers_to_two_kernels(name, bits):
    shape = LOWRANK[name]
    arguments = shape.arguments(2, 5000, bits)
    assert why_not(*arguments) is None
    program = lower_for(attention(shape), *arguments)
    assert program.count("__gpu$xla.gpu.triton") == 2
    first = "absorbed" if shape.heads == shape.kv_heads else "rebuilt"
    assert f"lowrank_{first}_scores" in program and "lowrank_average" in program


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("name", MODELS)
def test_tree_verification_lowers(name, bits):
    shape = LOWRANK[name]
    mask = jax.ShapeDtypeStruct((1, 9, 3000), jnp.bool_)
    position = jax.ShapeDtypeStruct((1, 3000), jnp.int32)
    program = lower_for(attention(shape), *shape.arguments(1, 3000, bits, 9), mask, position)
    assert "lowrank_rebuilt_scores" in program


FUSED = {
    "a long text": (LOWRANK["llama-2-7b"], 1, 65536),
    "a batch": (LOWRANK["llama-2-7b"], 8, 5000),
    "other ranks, two heads": (LowrankShape(4, 4, 128, 2, 64, 320, 5e5), 1, 3000),
    "other ranks, one head of 64": (LowrankShape(3, 3, 64, 3, 64, 64, 1e4), 1, 3000),
}


@pytest.mark.skipif(mosaic_missing() is not None, reason=str(mosaic_missing()))
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("case", [c if c == "a long text" else slow(c) for c in FUSED])
def test_decoding_lowers_to_one_mosaic_kernel(case, bits):
    """Shapes that tile: the interpreter does not notice tiles that do not fit."""
    shape, batch, slots = FUSED[case]
    arguments = shape.arguments(batch, slots, bits)
    *most, lengths = arguments
    assert why_not_mosaic(*most, shape.frequencies, lengths) is None
    mask = jax.ShapeDtypeStruct((1, 1, slots), jnp.bool_) if batch > 1 else None
    program = lower_for(attention(shape, "mosaic"), *arguments, mask)
    assert program.count("mosaic_gpu_v2") == 1 and "xla.gpu.triton" not in program


@pytest.mark.skipif(mosaic_missing() is not None, reason=str(mosaic_missing()))
@pytest.mark.parametrize("name, reason", [("qwen2.5-7b", "grouped queries"), ("qwen3-8b", "gro")])
def test_grouped_queries_are_left_to_triton(name, reason):
    shape = LOWRANK[name]
    *most, lengths = shape.arguments(1, 4096, 16)
    assert reason in why_not_mosaic(*most, shape.frequencies, lengths)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("name", LOWRANK)
def test_cache_bytes_are_those_of_the_arrays(name, bits):
    shape = LOWRANK[name]
    _, k, v, *_ = shape.arguments(2, 100, bits)
    real = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((k, v)))
    assert shape.cache_bytes(2, 100, bits) == real
    assert block_bytes(shape.k_rank, 16) == 2 * shape.k_rank


def test_codes_that_offsets_do_not_reach_are_left_to_xla():
    """Pallas counts bytes with 32 signed bits up to 4 GiB, with 64 beyond."""
    shape = LOWRANK["llama-2-7b"]
    reasons = [why_not(*shape.arguments(32, slots, 4)) for slots in (32768, 65536, 524288)]
    assert reasons[0] is None and reasons[2] is None and "32-bit offsets" in reasons[1]
