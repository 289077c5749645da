"""Every named matrix becomes Triton IR, without a GPU."""

import pytest

from pallas_kernels.lowering import lower_for
from pallas_kernels.quantized_matmul import quantized_matmul, why_not
from pallas_kernels.quantized_matmul.shapes import MATMUL
from pallas_kernels.quantized_matmul.tiling import Tiling


def lowered(name, rows, bits, group=64, cfg=None):
    shape = MATMUL[name]
    x, w = shape.rows(rows), shape.packed(bits, group)
    assert why_not(x, w) is None
    f = lambda x, w: quantized_matmul(x, w, implementation="triton", tiling=cfg)
    return lower_for(f, x, w)


@pytest.mark.parametrize("name", MATMUL)
def test_four_bits_lower_to_one_kernel(name):
    program = lowered(name, 6, 4)
    assert program.count("__gpu$xla.gpu.triton") == 1 and 'name = "quantized_matmul"' in program


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_all_bits_and_rows(bits, rows):
    assert "__gpu$xla.gpu.triton" in lowered("qwen2.5-7b/gate", rows, bits)


@pytest.mark.parametrize("group", [16, 32, 128, 256])
def test_groups(group):
    assert "__gpu$xla.gpu.triton" in lowered("qwen2.5-7b/gate", 6, 4, group)


def test_one_split_needs_no_second_kernel():
    """The kernel writes bfloat16 itself, and nothing is summed, cut or converted after it."""
    program = lowered("qwen2.5-7b/gate", 6, 4, cfg=Tiling(splits=1))
    after = program[program.index("__gpu$xla.gpu.triton") :]
    assert "stablehlo.add" not in after and "stablehlo.convert" not in after
    split = lowered("qwen2.5-7b/gate", 6, 4, cfg=Tiling(splits=4))
    assert split[split.index("__gpu$xla.gpu.triton") :].count("stablehlo.add") == 3
