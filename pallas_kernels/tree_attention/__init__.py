"""Attention of a few tokens, each with its own mask, over a cache: one pass over its slots."""

from pallas_kernels.tree_attention.api import tree_attention, why_not

__all__ = ["tree_attention", "why_not"]
