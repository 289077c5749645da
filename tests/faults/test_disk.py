"""A full disk and a folder that is read-only: every command says so on one line."""

import contextlib
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
        "--checkpoint {model} --output {out}/new --save {out}/store --text {text}",
    ),
    "qyolop predict": (qyolop.cli, "predict --input {image} --output {out}/new"),
    "qyolop evaluate": (qyolop.cli, "evaluate --limit 1 --output {out}/new"),
    "qyolop train": (qyolop.cli, "train --output {out}/new"),
}


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    """A small file system of its own at a folder. Only root may do that."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
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
    return dict(model=model, image=image, text=root / "text.txt")


@pytest.mark.slow
@pytest.mark.parametrize("options, words", [("size=12k", "No space left"), ("ro", "Read-only")])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_takes_no_more_is_named(given, tmp_path, capfd, name, options, words):
    command, flags = COMMANDS[name]
    with mounted(tmp_path / "disk", options) as disk:
        status = command(flags.format(out=disk, **given).split())
    err = capfd.readouterr().err
    assert status == 2, err
    assert words in err and "Traceback" not in err, err
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1
