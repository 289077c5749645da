"""Low-rank, quantized KV caches as transformations of parameters (Palu, arXiv 2407.21118)."""


class PaluError(ValueError):
    """The base of this package's errors; their messages are for users."""
