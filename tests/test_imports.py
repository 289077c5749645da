"""Imports flow one way, and the core packages need nothing but jax and numpy to import."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MAY_IMPORT = {
    # package -> project packages it may import, anywhere in a file
    "pallas_kernels": set(),
    "llm_jax": {"pallas_kernels"},
    "subspec_jax": {"llm_jax", "pallas_kernels"},
    "palu_jax": {"llm_jax", "pallas_kernels"},
    "qyolop_jax": {"llm_jax"},
    "experiments": {"llm_jax", "subspec_jax", "palu_jax", "qyolop_jax", "pallas_kernels"},
}
CORE = ("pallas_kernels", "llm_jax", "subspec_jax", "palu_jax")
ALWAYS = {*sys.stdlib_module_names, "jax", "numpy"}
PRESENT = [name for name in MAY_IMPORT if (ROOT / name).is_dir()]


def imported(tree: ast.Module, package: str):
    """Pairs (top-level name of an import, whether it runs when the module is imported)."""

    def visit(node, at_import):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], at_import
        elif isinstance(node, ast.ImportFrom):
            yield (package if node.level else node.module.split(".")[0]), at_import
        inner = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_import and not inner)

    return list(visit(tree, True))


def violations(source: str, package: str) -> list[str]:
    """What is wrong with the imports of one file of `package`."""
    wrong = []
    for name, at_import in imported(ast.parse(source), package):
        if name in MAY_IMPORT:
            if name != package and name not in MAY_IMPORT[package]:
                wrong.append(f"{package} imports {name}")
        elif name == "tests":
            wrong.append(f"{package} imports the tests")
        elif package in CORE and at_import and name not in ALWAYS:
            wrong.append(f"{package} imports {name} when it is imported")
    return wrong


@pytest.mark.parametrize("package", PRESENT)
def test_imports_flow_one_way(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = {str(f.relative_to(ROOT)): violations(f.read_text(), package) for f in files}
    assert not {file: wrong for file, wrong in found.items() if wrong}


@pytest.mark.parametrize(
    "package, source, count",
    [
        ("llm_jax", "import jax.numpy as jnp, os\nfrom pallas_kernels import x", 0),
        ("llm_jax", "from subspec_jax.tree import Tree", 1),
        ("llm_jax", "def f():\n    import subspec_jax", 1),  # no arrow back, not even a late one
        ("llm_jax", "def f():\n    import gguf", 0),
        ("llm_jax", "import gguf", 1),
        ("llm_jax", "try:\n    from safetensors import numpy\nexcept ImportError:\n    pass", 1),
        ("llm_jax", "class A:\n    import transformers", 1),
        ("subspec_jax", "from . import tree\nfrom llm_jax.cache import KV", 0),
        ("subspec_jax", "import palu_jax.rank", 1),  # sideways
        ("palu_jax", "import subspec_jax", 1),
        ("qyolop_jax", "import flax.linen\nimport palu_jax", 1),
        ("pallas_kernels", "import llm_jax", 1),
        ("experiments", "import tyro\nimport subspec_jax, qyolop_jax", 0),
        ("experiments", "import tests.conftest", 1),
    ],
)
def test_the_rule_itself(package, source, count):
    assert len(violations(source, package)) == count


def test_core_packages_import_with_jax_and_numpy_alone():
    """And importing them starts no backend, so a memory limit can still be set."""
    modules = [
        ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in PRESENT
        if package in CORE
        for f in sorted((ROOT / package).rglob("*.py"))
    ]
    program = f"""
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "tokenizers", "gguf", "safetensors", "flax",
                "torch", "huggingface_hub", "jinja2", "tyro", "rich", "matplotlib", "chex"):
            raise ModuleNotFoundError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
for name in {modules!r}:
    importlib.import_module(name)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
try:
    import gguf
except ModuleNotFoundError:
    print("imported", len({modules!r}))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["imported", str(len(modules))]
