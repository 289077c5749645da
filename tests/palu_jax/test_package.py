"""The names of the package: all there, loaded when they are used, hidden by no module."""

import pathlib
import subprocess
import sys

import palu_jax

ROOT = pathlib.Path(palu_jax.__file__).parent


def test_importing_the_package_loads_nothing_else():
    program = """
import sys, palu_jax
print([name for name in sys.modules if name.startswith(("palu_jax.", "llm_jax", "jax", "numpy"))])
assert palu_jax.Recipe.__name__ == "Recipe"
print("palu_jax.convert" in sys.modules, "palu_jax.store" in sys.modules)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT.parent
    )
    assert ran.stdout.splitlines() == ["[]", "True False"], ran.stderr


def test_every_name_is_what_it_says():
    """After all modules were imported, which set attributes of the package."""
    modules = {file.stem for file in ROOT.glob("*.py")} - {"__init__"}
    for module in sorted(modules):
        __import__(f"palu_jax.{module}")
    assert not modules & set(palu_jax.__all__)
    assert sorted(palu_jax.__all__) == sorted([*palu_jax._HOMES, "PaluError"])
    assert set(palu_jax.__all__) <= set(dir(palu_jax))
    for name in palu_jax.__all__:
        found = getattr(palu_jax, name)
        assert callable(found) and found.__name__ == name
        assert found.__module__ == palu_jax._HOMES.get(name, "palu_jax")


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(palu_jax, "compres")
