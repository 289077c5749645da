"""Everything on a CPU works with a jax that has no Triton backend for Pallas."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "llm_jax", "subspec_jax", "palu_jax", "qyolop_jax", "experiments")
PALLAS = "jax.experimental.pallas"
BLOCKED = f"""
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("{PALLAS}"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""
REASON = "this jax has no Triton backend for Pallas (jax.experimental.pallas.triton)"


def name_of(file: pathlib.Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def holds_kernels(file: pathlib.Path) -> bool:
    """Whether a module imports Pallas when it is imported."""
    found = (n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ImportFrom))
    names = {f"{n.module}.{alias.name}" for n in found for alias in n.names}
    return any(name.startswith(PALLAS) for name in names)


def run(program: str) -> str:
    found = subprocess.run(
        [sys.executable, "-c", BLOCKED + program], capture_output=True, text=True, cwd=ROOT
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_all_modules_but_the_kernels_import():
    files = [f for package in PACKAGES for f in sorted((ROOT / package).rglob("*.py"))]
    kernels = {name_of(f) for f in files if holds_kernels(f)}
    rooms = {name.rsplit(".", 1)[0] for name in kernels}
    assert len(rooms) == 5 and all(room.startswith("pallas_kernels.") for room in rooms)
    kernels |= {f"{room}.{way}" for room in rooms for way in ("triton", "mosaic")}
    names = [name for name in map(name_of, files) if name not in kernels]
    names = [name for name in names if not name.endswith("__main__")]
    out = run(f"""
from llm_jax.extras import MissingPackage
missing = []
for name in {names!r}:
    try:
        importlib.import_module(name)
    except MissingPackage:  # of an extra that is not installed here
        missing.append(name)
assert not [name for name in missing if name.split(".")[0] not in ("qyolop_jax", "experiments")]
print(len({names!r}), [name for name in sys.modules if name.startswith("{PALLAS}")])
""")
    assert out.split() == [str(len(names)), "[]"]


WHY_NOT = f"""
import jax.numpy as jnp
from pallas_kernels.device import triton_missing
from pallas_kernels.lowrank_attention import Latents, lowrank_attention
from pallas_kernels.lowrank_attention import why_not as lowrank
from pallas_kernels.quantized_matmul import quantized_matmul, repack
from pallas_kernels.quantized_matmul import why_not as matmul
from pallas_kernels.residual_decode import Residual, residual_decode
from pallas_kernels.residual_decode import why_not as residual
from pallas_kernels.rotary_cache import rotary_cache
from pallas_kernels.rotary_cache import why_not as rotary
from pallas_kernels.tree_attention import tree_attention
from pallas_kernels.tree_attention import why_not as tree

assert triton_missing() == {REASON!r}
zeros = lambda *shape: jnp.zeros(shape, jnp.bfloat16)
w = repack(jnp.zeros((1, 64, 256), jnp.uint8), zeros(1, 256), zeros(1, 256), 4)
r = Residual(jnp.zeros((8, 128), jnp.uint32), None, (64, 256), "bfloat16", 0)
z = Latents(zeros(1, 64, 16), None, None, 16, (16,))
q, cache, angle = zeros(1, 2, 4, 64), zeros(1, 64, 2, 64), jnp.zeros((2, 32), jnp.float32)
calls = {{
    "tree": (tree, tree_attention, (q, cache, cache, jnp.ones((1, 2, 64), bool))),
    "rotary": (rotary, rotary_cache, (zeros(1, 2, 512), None, angle, angle, cache[0], cache[0],
                                      jnp.int32(0))),
    "matmul": (matmul, quantized_matmul, (zeros(2, 64), w)),
    "residual": (residual, residual_decode, (r, w)),
    "lowrank": (lowrank, lowrank_attention, (q, z, z, zeros(1, 16, 2, 64), zeros(1, 16, 2, 64),
                                             jnp.ones(32), jnp.array([64]))),
}}
for name, (why_not, f, arguments) in calls.items():
    first = (arguments[0], *arguments[4:6]) if name == "rotary" else arguments
    assert why_not(*first) == {REASON!r}, name
    f(*arguments)
    for options in (dict(implementation="triton"), dict(interpret=True)):
        try:
            f(*arguments, **options)
        except NotImplementedError as error:
            assert str(error) == {REASON!r}
        else:
            raise AssertionError(name)
print("done")
"""


@pytest.mark.slow
def test_why_not_says_so_and_xla_computes():
    assert run(WHY_NOT) == "done\n"


DECODE = """
import dataclasses
import jax
from llm_jax import generate
from llm_jax.testing import tiny_config, tiny_params
from palu_jax.convert import Recipe, to_palu
from palu_jax.format import LatentFormat
from subspec_jax.decoder import Decoder
from subspec_jax.draft_model import substitute
from subspec_jax.offload import place
from subspec_jax.propose import ModelDraft
from subspec_jax.tree import TreeSpec
from subspec_jax.verify import Target

cfg = tiny_config("qwen2", d_model=32, head_dim=8, d_ff=64, vocab=97)
plain = tiny_params(cfg)
ranks = (((8,), (12,)), ((6,), (16,)))
for params in (plain, to_palu(plain, cfg, Recipe((2,), ranks, "plain", LatentFormat(4, 4)))):
    want = generate(params, [1, 2, 3], cfg, 6)
    target = Target(dataclasses.replace(params, layers=place(params.layers, 0)), cfg)
    draft = ModelDraft(substitute(target.params, 4, 16), cfg, TreeSpec("beam", 2, 2))
    rounds = list(Decoder(target, draft, max_length=32, chunk=16).rounds([1, 2, 3], 6))
    assert [t for r in rounds for t in r.tokens] == want and len(want) == 6
print("done")
"""


@pytest.mark.slow
def test_models_decode():
    assert run(
        "import jax\njax.config.update('jax_disable_most_optimizations', True)" + DECODE
    ) == ("done\n")
