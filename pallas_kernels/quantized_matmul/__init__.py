"""Products of a few 16-bit rows with a group-wise low-bit matrix."""

from pallas_kernels.quantized_matmul.api import quantized_matmul, why_not
from pallas_kernels.quantized_matmul.packing import Packed, repack, restore

__all__ = ["Packed", "quantized_matmul", "repack", "restore", "why_not"]
