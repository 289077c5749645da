"""Progress bars for the commands: those of `llm_jax.progress`, which the packages use too."""

from llm_jax.progress import Bar, bar

__all__ = ["Bar", "bar"]
