"""The command that compares foreign models with native ones, on a tiny one."""

import json

import pytest

from experiments.measure import foreign


@pytest.mark.slow
def test_every_line_works(tmp_path, capsys):
    output = tmp_path / "foreign.jsonl"
    flags = ["--width", "64", "--layers", "2", "--tokens", "12", "--repeat", "1"]
    assert foreign.cli([*flags, "--output", str(output)]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    kinds = ["dict"] * 2 + ["Flax NNX"] * 2 + ["Flax Linen"] * 2 + ["four functions"] * 2
    assert [line["model"] for line in lines] == kinds
    assert all(line["works"] for line in lines)
    for line in lines:
        assert line["over_native"] == line["seconds"] / line["native_seconds"]
        # each layer that multiplies by int8 rounds its input to 8 bits
        rounded = line["transform"] == "substitutes, int8" and line["model"] != "dict"
        if line["error"] is not None:
            assert line["error"] < (0.05 if rounded else 1e-5)
    assert "four functions" in capsys.readouterr().out
