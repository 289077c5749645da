"""Queries rotated, and keys and values written to the cache, from one product: one kernel."""

from pallas_kernels.rotary_cache.api import rotary_cache, why_not

__all__ = ["rotary_cache", "why_not"]
