"""Quick compilation, for the tests that ask for it: most of their time would be XLA's."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    """The programs are the same without XLA's optimizations, only slower."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
