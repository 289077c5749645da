"""From the terms of a product to the sum of residuals and its norm: one kernel."""

from pallas_kernels.add_norm.api import add_norm, why_not

__all__ = ["add_norm", "why_not"]
