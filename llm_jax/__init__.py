"""A plain decoder-only language model as pure functions over pytrees. Needs jax and numpy alone."""


class LLMError(ValueError):
    """The base of this package's errors; their messages are for users."""
