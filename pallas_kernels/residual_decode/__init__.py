"""Exact 16-bit matrices from a low-bit substitute and its residual."""

from pallas_kernels.residual_decode.api import parts_of, residual_decode, why_not
from pallas_kernels.residual_decode.code import Residual

__all__ = ["Residual", "parts_of", "residual_decode", "why_not"]
