"""The report of bits a weight, on a tiny checkpoint, an encoder's file and normal numbers."""

import json

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from experiments.measure import residual
from experiments.measure.residual import ResidualBits, cli, entropy, main, matrices
from llm_jax.testing import tiny_config, tiny_params, write_gguf


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_normal_numbers(tmp_path, capsys):
    args = ResidualBits("gaussian:512x512", output=tmp_path / "out.jsonl", time_decoder=True)
    main(args, Console())
    one, whole = lines(tmp_path / "out.jsonl")
    assert one["kind"] == "matrix" and whole["kind"] == "whole"
    assert whole["floor"] < whole["levels"] < whole["planes"] < whole["entropy"] < whole["raw"]
    assert whole["levels"] < 7.7 and whole["planes"] < 9.2
    assert whole["weights"] == "full-precision weights" and whole["environment"]["commit"]
    assert set(one["levels_seconds"]) == {"encode", "decode", "copy", "xla"}
    assert "full-precision weights" in capsys.readouterr().out


@pytest.mark.slow
def test_a_checkpoint_on_a_grid_says_so(tmp_path):
    cfg = tiny_config("qwen2", layers=2, d_ff=128)
    path = write_gguf(tmp_path / "model.gguf", tiny_params(cfg), cfg, "Q4_1")
    main(ResidualBits(str(path), output=tmp_path / "out.jsonl"), Console(quiet=True))
    *each, whole = lines(tmp_path / "out.jsonl")
    assert [(r["layer"], r["matrix"]) for r in each[:2]] == [(0, "q"), (0, "k")] and len(each) == 14
    assert whole["weights"] == "weights dequantized from Q4_1: they lie on a low-bit grid"
    assert whole["levels"] <= whole["levels_padded_3"] <= whole["levels_padded_1"]


def test_matrices_of_any_safetensors_file(tmp_path, capsys):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    tensors = {
        "embeddings.word.weight": draw(9, 64),
        "encoder.layer.1.query.weight": draw(32, 64),
        "encoder.layer.1.query.bias": draw(32),
        "pooler.weight": draw(64, 64),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    found = list(matrices(str(path)))
    assert [(m.layer, m.name, m.w.shape, m.stored) for m in found] == [
        (1, "query.weight", (64, 32), "F32"),
        (None, "pooler.weight", (64, 64), "F32"),
    ]
    args = ResidualBits(str(path), matrices=1, output=tmp_path / "out.jsonl")
    main(args, Console(quiet=True))
    assert len(lines(tmp_path / "out.jsonl")) == 2
    save_file({"bias": draw(4)}, tmp_path / "none.safetensors")
    assert cli(["--model", str(tmp_path / "none.safetensors")]) == 2
    assert "holds no matrices" in capsys.readouterr().err


def test_an_interrupt_keeps_the_matrices_that_are_done(tmp_path, monkeypatch, capsys):
    rng, done, stop, real = np.random.default_rng(0), [], [None], residual.one
    tensors = {f"layer.{n}.w": rng.normal(size=(64, 64)).astype(np.float32) for n in range(3)}
    save_file(tensors, tmp_path / "model.safetensors")

    def one(matrix, args):
        if len(done) == stop[0]:
            raise KeyboardInterrupt
        done.append(matrix.layer)
        return real(matrix, args)

    monkeypatch.setattr(residual, "one", one)
    words = ["--model", str(tmp_path / "model.safetensors"), "--output"]
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    assert cli([*words, str(whole)]) == 0
    done.clear()
    stop[0] = 2
    assert cli([*words, str(part)]) == 130 and done == [0, 1] and len(lines(part)) == 2
    assert "the same command with the same --output resumes" in capsys.readouterr().err
    stop[0] = None
    assert cli([*words, str(part)]) == 0
    assert done == [0, 1, 2] and "1 w: done before" in capsys.readouterr().out
    clock = ("environment", "levels_seconds", "planes_seconds")
    timeless = lambda path: [{k: v for k, v in r.items() if k not in clock} for r in lines(path)]
    assert timeless(whole) == timeless(part) and len(lines(part)) == 4
    done.clear()
    assert cli([*words, str(part)]) == 0 and len(done) == 3  # it had ended: all of it, again


def test_normal_numbers_need_two_sizes(capsys):
    assert cli(["--model", "gaussian:512"]) == 2
    assert "'gaussian:512' is not like gaussian:3584x18944" in capsys.readouterr().err


def test_entropy():
    assert entropy(np.array([1, 1, 2, 2, 3, 3, 4, 4])) == pytest.approx(2)
    assert entropy(np.zeros(5)) == 0
