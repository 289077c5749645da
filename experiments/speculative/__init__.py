"""Speculative decoding of models that do not fit: `python -m experiments.speculative`."""
