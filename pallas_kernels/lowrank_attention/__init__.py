"""Attention of a few queries over a cache of low-rank latents."""

from pallas_kernels.lowrank_attention.api import lowrank_attention, why_not, why_not_mosaic
from pallas_kernels.lowrank_attention.latents import Latents

__all__ = ["Latents", "lowrank_attention", "why_not", "why_not_mosaic"]
