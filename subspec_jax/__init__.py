"""Lossless speculative decoding of models too big for the GPU (SubSpec, arXiv 2509.18344)."""


class SubspecError(ValueError):
    """The base of this package's errors; their messages are for users."""
