"""On a CPU a memory limit is real: what a process takes at most, as Linux counts it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_jax.testing import tiny_config, tiny_params, write_safetensors
from subspec_jax.memory import PROCESS_BYTES

CFG = tiny_config("qwen2", layers=18, d_model=512, d_ff=2048, heads=8, kv_heads=2, head_dim=64)
PROGRAM = """
import sys
from pathlib import Path
import subspec_jax
from subspec_jax.tree import TreeSpec

model, limit, method = sys.argv[1:]
small = dict(max_length=256, chunk=32, tree=TreeSpec("beam", 3, 2))
with subspec_jax.open(model, limit, method=method, **small) as engine:
    engine.generate(list(range(1, 20)), 8, eos=())
    status = Path("/proc/self/status").read_text().splitlines()
    print(len(engine.plan.disk), *(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_safetensors(tmp_path_factory.mktemp("model"), tiny_params(CFG), CFG)


def peak(model, limit, method, cache):
    """(layers on disk, bytes of memory at most) of a process that writes some tokens."""
    variables = os.environ | dict(THIMBLE_CACHE=str(cache), JAX_PLATFORMS="cpu")
    command = [sys.executable, "-c", PROGRAM, str(model), limit, method]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    layers, kib = map(int, done.stdout.split()[-2:])
    return layers, kib * 1024


@pytest.mark.slow
@pytest.mark.parametrize("method, megabytes", [("vanilla", 90), ("subspec", 160)])
def test_a_process_stays_within_its_limit_and_what_programs_take(
    model, tmp_path, method, megabytes
):
    weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    assert weights > 250 * 2**20
    for _ in range(2):  # once it writes the layers to the disk, too
        layers, most = peak(model, f"{megabytes}MB", method, tmp_path)
        assert layers >= 9
        assert most < megabytes * 2**20 + PROCESS_BYTES
    layers, most = peak(model, "full", method, tmp_path)
    assert layers == 0 and most > megabytes * 2**20 + PROCESS_BYTES  # or the test shows nothing
