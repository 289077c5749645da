"""What is installed from an index: the packages, small, with a licence, and no results."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "llm_jax", "subspec_jax", "palu_jax", "qyolop_jax", "experiments")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder)]
    built = subprocess.run([*command, str(ROOT)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.mark.slow
def test_the_wheel_is_small_and_holds_no_data(wheel):
    assert wheel.stat().st_size < 650_000  # code alone: 230 files of 2 KB
    names = zipfile.ZipFile(wheel).namelist()
    kept = [n for n in names if n.startswith(PACKAGES)]
    assert all(
        n.endswith((".py", "py.typed", "tuned.json", "prompts.jsonl", "texts.jsonl", "page.html"))
        for n in kept
    )
    for package in PACKAGES:
        assert f"{package}/__init__.py" in names and f"{package}/py.typed" in names
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == set(PACKAGES)


@pytest.mark.slow
def test_the_wheel_says_what_it_is(wheel):
    import subspec_jax

    with zipfile.ZipFile(wheel) as files:
        text = lambda end: files.read(next(n for n in files.namelist() if n.endswith(end))).decode()
        metadata, entries = text("METADATA"), text("entry_points.txt")
        assert "Apache License" in text("LICENSE")
    assert f"Version: {subspec_jax.__version__}" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert "the thimble-jax authors" in metadata
    for paper in ("2509.18344", "2407.21118", "2307.04537"):
        assert f"https://arxiv.org/abs/{paper}" in metadata
    assert "thimble = experiments.__main__:main" in entries
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    hard = [line.split(":")[1].split(">=")[0].strip() for line in needed if "extra ==" not in line]
    assert len(hard) == 10 and not {"matplotlib", "orbax-checkpoint", "safetensors"} & set(hard)
