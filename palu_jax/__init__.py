"""Low-rank, quantized KV caches as transformations of parameters (Palu, arXiv 2407.21118)."""
