"""Strictness for every test: no silent dtype or rank promotion."""

import pathlib

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """`@pytest.mark.quick_cases("a", "b")`: of a parametrized test, all other cases are slow."""
    cases = {}
    for item in items:
        if marker := item.get_closest_marker("quick_cases"):
            quick = item.callspec.id in marker.args
            cases.setdefault(item.originalname + str(item.path), []).append(quick)
            if not quick:
                item.add_marker(pytest.mark.slow)
    for name, found in cases.items():
        if len(found) > 1 and not any(found):
            raise pytest.UsageError(f"quick_cases names no case of {name}")


SHARED_DATA = pathlib.Path(__file__).parents[1].parent / "shared" / "data"


@pytest.fixture
def shared_data():
    """The folder of real evaluation data beside the checkout, or a skip that says so."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the evaluation data (../shared/data) is not beside this checkout")
    return SHARED_DATA


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Drops compiled programs after each file: some five memory maps each, and Linux grants 65,530.

    Without it the whole suite ends in a segmentation fault inside XLA's compiler.
    """
    yield
    jax.clear_caches()
