"""Low-rank, quantized KV caches: `python -m experiments.palu`."""
