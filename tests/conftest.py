"""For every test: no silent dtype or rank promotion, and programs that are compiled once."""

import os
import pathlib
import random

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# All programs are kept on disk, small ones too: each file of tests forgets those in memory (below),
# and a program that is read takes a tenth of the time of one that is compiled. The workers share
# the folder, and the processes that tests start use it as well.
COMPILED = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "compiled"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs",
    float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]),
)


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
    if seed := os.environ.get("FILES_SHUFFLED_BY"):
        # CI has no time for all slow tests: so it begins with other files at every commit.
        files = sorted({item.path for item in items})
        random.Random(seed).shuffle(files)
        place = {path: i for i, path in enumerate(files)}
        items.sort(key=lambda item: place[item.path])


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
