"""SIGINT in the middle of every long command: one line, status 130, and it goes on afterwards."""

import dataclasses
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from safetensors.numpy import load_file

from llm_jax.testing import tiny_config, tiny_params, write_safetensors
from qyolop_jax.config import ModelConfig
from qyolop_jax.model import initial
from qyolop_jax.scenes import scene
from qyolop_jax.weights import save_weights

ROOT = Path(__file__).parents[2]
CFG = tiny_config("qwen2", layers=8, d_model=32, d_ff=64)
NETWORK = ModelConfig(0.01, "relu", size=(64, 64))
SECONDS = 600
"""For a process; compiling takes most of it."""
CLOCK = (
    "time",
    "seconds",
    "environment",
    "images_per_second",
    "prefill_s",
    "decode_s",
    "peak_bytes",
)
CLOCK += ("rounds", "planes_seconds", "levels_seconds")
"""Fields of records that differ from run to run."""


def lines(path: Path) -> list[dict[str, Any]]:
    """Records, in an order of their own, without what the clock says."""
    rows = map(json.loads, path.read_text().splitlines())
    return sorted(({k: v for k, v in r.items() if k not in CLOCK} for r in rows), key=str)


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def arrays(path: Path) -> dict[str, bytes]:
    return {name: a.tobytes() for name, a in load_file(path).items()}


@dataclasses.dataclass(frozen=True)
class Long:
    """A command that takes long."""

    words: str
    """{out} is a folder of its own, the other names are files of `given`."""
    begun: str
    """What is there once it works: a pattern of files below {out}, or a text that it prints."""
    made: Callable[[Path], Any] | None = None
    """What it has made in {out}, which must be what it makes without an interrupt."""
    resumes: str = ""
    """What it prints when it goes on; empty if it says nothing or begins anew."""


SMALL = "--depth 2 --width 2 --draft-group 16 --max-length 192"
COMMANDS = {
    "speculative": Long(
        "speculative --checkpoint {model} --output {out} --samples 4 --max-new-tokens 6 --chunk 64"
        f" {SMALL} --resident 1 --memory-limit 16MB --no-show --compare vanilla",
        "records.jsonl",
        lambda out: [
            (r["method"], r["sample"], r["token_ids"]) for r in lines(out / "records.jsonl")
        ],
        "turns were done before",
    ),
    "palu": Long(
        "palu --checkpoint {model} --output {out} --calibration {text} --evaluation {text}"
        " --calibration-tokens 4096 --calibration-length 128 --tokens 2048 --context 128"
        " --preset none --keep 0.5 0.6 0.7",
        "records.jsonl",
        lambda out: [(r["method"], r["result"]) for r in lines(out / "records.jsonl")],
    ),
    "convert": Long(
        "convert --checkpoint {model} --to {out}/new --draft-group 16",
        "new/layer-00000.safetensors",
        lambda out: files(out / "new"),
    ),
    "train": Long(
        "qyolop train --width 0.01 --size 64 64 --scenes 4 --held-out 2 --epochs 1 1 1 1 --batch 2"
        " --output {out}",
        "checkpoints/2.safetensors",
        lambda out: [arrays(out / f"model{n}.safetensors") for n in ("", "-int8")],
    ),
    "evaluate": Long(
        "qyolop evaluate --run {network} --scenes 150 --batch 2 --output {out}/scores.jsonl",
        "scores.jsonl.unfinished/records.jsonl",
        lambda out: lines(out / "scores.jsonl"),
        "of 150 images were done before",
    ),
    "quantize": Long(
        "qyolop quantize --run {network} --scenes 4 --images 3 --sensitivity --evaluate"
        " --held-out 8 --output {out}/int8.safetensors",
        "*.unfinished/records.jsonl",
        lambda out: (
            arrays(out / "int8.safetensors"),
            *(lines(out / name) for name in ("int8.jsonl", "sensitivity.jsonl")),
        ),
        "was done before",
    ),
    "benchmark": Long(
        "qyolop benchmark --run {network} --batch 1 --repeats 8 --output {out}/speed.jsonl",
        "speed.jsonl.unfinished/records.jsonl",
        lambda out: [
            (r["engine"], r["precision"], r["repeats"]) for r in lines(out / "speed.jsonl")
        ],
        "of 8 rounds were done before",
    ),
    "export": Long(
        "qyolop export --run {network} --precision float32 --format stablehlo"
        " --output {out}/net.stablehlo",
        ".net.stablehlo.*",
        lambda out: files(out),
    ),
    "predict": Long(
        "qyolop predict --run {network} --input {images} --output {out}",
        "predict.jsonl",
        files,
        "of them before",
    ),
    "predict a video": Long(
        "qyolop predict --run {network} --input {video} --output {out}/seen.mp4",
        ".seen.mp4.*/seen.mp4",
        files,
    ),
    "measure.residual": Long(
        "measure.residual --model {model} --group 16 --output {out}/bits.jsonl",
        "bits.jsonl",
        lambda out: lines(out / "bits.jsonl"),
        "done before",
    ),
    "measure.tree_trace": Long(
        "measure.tree_trace {out}/trace.jsonl --checkpoint {model} --benchmark builtin --samples 3"
        " --tokens 14 --depth 4 --width 2 --batch 4 --draft-bits 8 --draft-group 16"
        " --max-length 192",
        "trace.jsonl",
        lambda out: (out / "trace.jsonl").read_text(),
        "done before",
    ),
    "measure.offload": Long(
        "measure.offload --output {out} --checkpoint {model} --memory-limit 16MB --only vanilla raw"
        f" --tokens 6 --plain-tokens 6 --flags='--samples 1 --chunk 64 {SMALL} --resident 1'",
        "offload.jsonl",
        lambda out: [r["configuration"] for r in lines(out / "offload.jsonl")],
        "vanilla: done before",
    ),
    "measure.transfers": Long(
        "measure.transfers --layers 2 --tokens 8 --slots 64 --repeats 3", "copies alone"
    ),
}


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, Path]:
    """The inputs of all commands."""
    root = tmp_path_factory.mktemp("given")
    (root / "text.txt").write_text("A thimble holds little. " * 4000)
    save_weights(root / "network.safetensors", NETWORK, initial(NETWORK))
    (root / "images").mkdir()
    video = cv2.VideoWriter(str(root / "a.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (96, 64))
    for i in range(120):
        image = np.ascontiguousarray(scene(i % 4, (64, 96)).image[..., ::-1])
        cv2.imwrite(str(root / "images" / f"{i}.png"), image)
        video.write(image)
    video.release()
    model = write_safetensors(root / "model", tiny_params(CFG), CFG)
    return dict(
        model=model, text=root / "text.txt", network=root / "network.safetensors",
        images=root / "images", video=root / "a.mp4",
    )  # fmt: skip


class Process:
    """A command in a process, its output in a file beside its folder."""

    def __init__(self, command: Long, out: Path, given: dict[str, Path]):
        words = shlex.split(command.words.format(out=out, **given))
        self.command, self.out, self.log = command, out, out.with_suffix(".txt")
        out.mkdir(exist_ok=True)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", "experiments", *words], cwd=ROOT, stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()

    def begun(self) -> bool:
        there = any(self.out.glob(self.command.begun)) or self.command.begun in self.said()
        return there or self.process.poll() is not None

    def said(self) -> str:
        return self.log.read_text()

    def status(self) -> int:
        return self.process.wait(SECONDS)


def whole(command: Long, out: Path, given: dict[str, Path]) -> str:
    """What the command prints when nobody disturbs it."""
    with Process(command, out, given) as running:
        assert running.status() == 0, running.said()
        return running.said()


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupted_command_says_so_and_goes_on(given, tmp_path, name):
    command = COMMANDS[name]
    with Process(command, tmp_path / "out", given) as running:
        until = time.monotonic() + SECONDS
        while not running.begun():
            assert time.monotonic() < until, running.said()
            time.sleep(0.005)
        assert running.process.poll() is None, f"it has ended: {running.said()}"
        running.process.send_signal(signal.SIGINT)
        assert running.status() == 130, running.said()
        said = running.said()
    assert "\ninterrupted" in said and "Traceback" not in said and "Exception ignored" not in said
    assert command.resumes in whole(command, tmp_path / "out", given)
    if command.made:
        whole(command, tmp_path / "whole", given)
        assert command.made(tmp_path / "out") == command.made(tmp_path / "whole")
    left = [f.name for f in tmp_path.rglob("*") if ".unfinished" in f.name or f.name[0] == "."]
    assert not left
