"""From the product with q, k and v to turned heads, keys and values in the cache: one kernel."""

from pallas_kernels.rotary_cache.api import rotary_cache, why_not

__all__ = ["rotary_cache", "why_not"]
