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
LIGHT = {"llm_jax": {"LLMError", "digest", "extras", "files", "rules"}}
"""What packages that share no model code may use of another: its error and these modules."""
SHARES_NO_MODEL = ("qyolop_jax",)
CORE = ("pallas_kernels", "llm_jax", "subspec_jax", "palu_jax")
ALWAYS = {*sys.stdlib_module_names, "jax", "numpy"}
PRESENT = [name for name in MAY_IMPORT if (ROOT / name).is_dir()]


def statements(tree: ast.AST):
    """Pairs (import statement, whether it runs when the module is imported), in a file's order.

    What is imported under `if TYPE_CHECKING` is never imported and left out.
    """

    def visit(node, at_import):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node, at_import
        inner = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        typing = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in node.orelse if typing else ast.iter_child_nodes(node):
            yield from visit(child, at_import and not inner)

    return list(visit(tree, True))


def imported(tree: ast.Module, package: str):
    """Triples (package that is imported, first name below it or "", whether when imported)."""
    for node, at_import in statements(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif node.level:
            found = [package]
        else:
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in found:
            top, below, *_ = (*name.split("."), "")
            yield top, below, at_import


def violations(source: str, package: str) -> list[str]:
    """What is wrong with the imports of one file of `package`."""
    wrong = []
    for name, below, at_import in imported(ast.parse(source), package):
        if name in MAY_IMPORT:
            if name != package and name not in MAY_IMPORT[package]:
                wrong.append(f"{package} imports {name}")
            elif package in SHARES_NO_MODEL and name != package and below not in LIGHT[name]:
                wrong.append(f"{package} imports {below or 'all'} of {name}")
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
        ("qyolop_jax", "from llm_jax.files import atomic_file\nfrom llm_jax.extras import need", 0),
        ("qyolop_jax", "from llm_jax import extras, LLMError\nimport llm_jax.files", 0),
        ("qyolop_jax", "from llm_jax.model import forward", 1),
        ("qyolop_jax", "import llm_jax", 1),
        ("qyolop_jax", "def f():\n    from llm_jax import extras, generate", 1),
        ("llm_jax", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import palu_jax", 0),
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


def modules() -> dict[str, pathlib.Path]:
    """The project's modules by their dotted name."""
    files = (f for package in PRESENT for f in sorted((ROOT / package).rglob("*.py")))
    return {
        ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f
        for f in files
    }


def targets(source: str, name: str, is_package: bool, known) -> set[str]:
    """Which of the `known` modules this one imports, anywhere in it. `from a import b` is a.b where
    that is a module, else a; the packages around a module are not counted."""
    found = set()
    for node, _ in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        base = node.module or ""
        if node.level:
            above = name.split(".")[: len(name.split(".")) - node.level + is_package]
            base = ".".join([*above, *([node.module] if node.module else [])])
        below = {f"{base}.{alias.name}" for alias in node.names}
        found |= (below & set(known)) | ({base} if below - set(known) else set())
    return found & set(known)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components with more than one module, or with one that imports itself
    (Tarjan 1972)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for after in sorted(graph[node]):
            if after not in index:
                visit(after)
            if after in stack:
                low[node] = min(low[node], low[after])
        if low[node] == index[node]:
            at = stack.index(node)
            part, stack[at:] = stack[at:], []
            if len(part) > 1 or node in graph[node]:
                found.append(sorted(part))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def test_no_modules_import_each_other():
    """Late imports, in functions, count too: a circle is no better for being hidden."""
    known = modules()
    graph = {
        name: targets(file.read_text(), name, file.name == "__init__.py", known)
        for name, file in known.items()
    }
    assert circles(graph) == []


@pytest.mark.parametrize(
    "graph, expected",
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}, [["a", "b", "c"]]),
        ({"a": {"b"}, "b": {"a"}, "c": {"d", "a"}, "d": {"c"}}, [["a", "b"], ["c", "d"]]),
        ({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}, []),
        ({"a": {"a"}}, [["a"]]),
    ],
)
def test_circles(graph, expected):
    assert sorted(circles(graph)) == expected


@pytest.mark.parametrize(
    "source, expected",
    [
        ("import p.a\nimport os", {"p.a"}),
        ("from p import a, name", {"p", "p.a"}),
        ("from p.a import name", {"p.a"}),
        ("def f():\n    from p.q import b", {"p.q.b"}),
        ("from . import a", {"p.a"}),
        ("from .q.b import name", {"p.q.b"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import p.a", set()),
        ("import typing\nif typing.TYPE_CHECKING:\n    import p.a\nelse:\n    import p.q", {"p.q"}),
    ],
)
def test_targets_of_imports(source, expected):
    known = ("p", "p.a", "p.q", "p.q.b", "p.here")
    assert targets(source, "p.here", False, known) == expected


@pytest.mark.parametrize("package", CORE)
def test_importing_a_package_loads_none_of_its_modules(package):
    """Names come from their modules when they are first used, and stay names afterwards."""
    program = f"""
import importlib, sys, types
import {package} as package
loaded = [name for name in sys.modules if name.startswith("{package}.")]
assert not loaded and "jax" not in sys.modules, loaded
names = [name for name in package.__all__ if name != "__version__"]
assert set(package.__all__) <= set(dir(package)) and len(set(names)) == len(names)
for name in {sorted(m for m in modules() if m.startswith(package + ".") and "__main__" not in m)!r}:
    importlib.import_module(name)
for name in names:
    value = getattr(package, name)
    assert isinstance(value, types.ModuleType) == ({package == "pallas_kernels"}), name
try:
    package.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
else:
    raise AssertionError
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
