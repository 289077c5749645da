"""Products of a few 16-bit rows with a group-wise low-bit matrix."""

from pallas_kernels.quantized_matmul.api import quantized_matmul, why_not
from pallas_kernels.quantized_matmul.packing import Packed, codes_and_scales, repack

__all__ = ["Packed", "codes_and_scales", "quantized_matmul", "repack", "why_not"]
