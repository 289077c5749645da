"""The streamed pass of transfers, on a tiny model."""

import dataclasses
import io

import pytest
from rich.console import Console

from experiments.measure import transfers
from experiments.measure.transfers import Transfers, cli, main
from llm_jax.registry import MODELS
from llm_jax.testing import tiny_config


def test_each_way_gets_a_line(monkeypatch):
    cfg = tiny_config("qwen2", layers=3)
    model = dataclasses.replace(MODELS["qwen2.5-7b"], config=cfg)
    monkeypatch.setattr(transfers, "find_model", lambda name: model)
    console = Console(file=io.StringIO(), width=110)
    main(Transfers(layers=3, tokens=4, slots=16, dtype="float32", repeats=1), console)
    first, *lines = console.file.getvalue().splitlines()
    assert first.endswith(" GB")
    names = [
        *("copies alone", "jax.memory.Space.Device", "SingleDeviceSharding"),
        "the same, a block queued",
    ]
    assert [line[:24].strip() for line in lines] == names
    assert all(" ms " in line and line.endswith("GB/s") for line in lines)


@pytest.mark.parametrize("flags", ["--dtype float8", "--tokens 0", "--layers 0"])
def test_numbers_that_make_no_pass_are_refused(capsys, flags):
    assert cli(flags.split()) == 2
    assert "dtype must be one of" in capsys.readouterr().err
