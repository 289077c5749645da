"""A full disk and a folder that is read-only: every command says so on one line."""

import contextlib
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import convert
from experiments.palu import __main__ as palu
from experiments.qyolop import __main__ as qyolop
from experiments.speculative import __main__ as speculative
from llm_jax.testing import tiny_config, tiny_params, write_safetensors

CFG = tiny_config("qwen2", layers=2, d_model=32, d_ff=64)

COMMANDS = {
    # name -> (command, flags; {out} is on the full disk)
    "convert": (convert.cli, "--checkpoint {model} --to {out}/new --draft-group 16"),
    "speculative": (
        speculative.cli,
        "--checkpoint {model} --output {out}/new --samples 1 --max-new-tokens 4 --depth 2 --width 2"
        " --draft-group 16 --max-length 192 --chunk 64 --resident 1 --memory-limit 16MB --no-show"
        " --method vanilla --compare",
    ),
    "palu": (
        palu.cli,
        "--checkpoint {model} --output {out}/new --save {out}/store --calibration {text}"
        " --evaluation {text} --calibration-tokens 512 --calibration-length 128 --tokens 256"
        " --context 128 --preset none --keep 0.5",
    ),
    "qyolop predict": (qyolop.cli, "predict --input {image} --output {out}/new"),
    "qyolop evaluate": (
        qyolop.cli,
        "evaluate --run {network} --scenes 2 --batch 2 --output {out}/new.jsonl",
    ),
    "qyolop train": (
        qyolop.cli,
        "train --scenes 8 --output {out}/new",
    ),
}


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    """A small file system of its own at a folder. Only root may do that."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        jax.clear_caches()
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    root = tmp_path_factory.mktemp("given")
    image = root / "a.png"
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(image)
    (root / "text.txt").write_text("A thimble holds little. " * 400)
    model = write_safetensors(root / "model", tiny_params(CFG), CFG)
    network = Path(__file__).parents[2] / "experiments" / "checkpoints" / "roads-int8.safetensors"
    return dict(model=model, image=image, text=root / "text.txt", network=network)


def named(name: str, disk: Path, given, capfd, words: str) -> None:
    command, flags = COMMANDS[name]
    status = command(flags.format(out=disk, **given).split())
    err = capfd.readouterr().err
    assert status == 2, err
    assert words in err and "Traceback" not in err, err
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_takes_no_file_is_named_before_the_work(given, tmp_path, capfd, name):
    with mounted(tmp_path / "disk", "size=12k") as disk:
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        named(name, disk, given, capfd, "No space left")
    with mounted(tmp_path / "read-only", "ro") as disk:
        named(name, disk, given, capfd, "Read-only")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convert", "speculative", "palu", "qyolop predict"])
def test_a_disk_that_fills_during_the_work_is_named(given, tmp_path, capfd, name):
    with mounted(tmp_path / "disk", "size=12k") as disk:
        named(name, disk, given, capfd, "No space left")
