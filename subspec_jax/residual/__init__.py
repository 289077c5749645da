"""Residuals: the difference between 16-bit weights and their low-bit substitutes, in a code."""
