"""Exact 16-bit matrices from a low-bit substitute and its residual."""
