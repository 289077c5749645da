"""What checks of files cost: the records, and that both kinds of loads are timed."""

import json

import pytest

from experiments.measure import checks
from llm_jax import digest
from llm_jax.formats import open_checkpoint
from llm_jax.testing import tiny_config, tiny_params, write_safetensors
from subspec_jax.residual.convert import convert


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_identity_of_a_file_is_hashed_each_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("THIMBLE_CACHE", str(tmp_path / "cache"))
    file, seen, exact = tmp_path / "file", [], digest.hash_file
    file.write_bytes(bytes(10_000_000))
    monkeypatch.setattr(digest, "hash_file", lambda path: seen.append(path) or exact(path))
    flags = ["--file", str(file), "--repeats", "3", "--output", str(tmp_path / "out.jsonl")]
    assert checks.cli(flags) == 0
    (record,) = lines(tmp_path / "out.jsonl")
    assert seen == [file] * 3 and record["bytes"] == 10_000_000 and record["repeats"] == 3
    assert record["GB_per_s"] == pytest.approx(0.01 / record["seconds"])
    assert str(tmp_path) not in json.dumps(record)


@pytest.mark.slow
@pytest.mark.parametrize("cold", [[], ["--cold"]])
def test_loads_with_and_without_the_check_are_timed(tmp_path, monkeypatch, cold):
    cfg = tiny_config("qwen2", layers=2, dtype="bfloat16")
    source = open_checkpoint(write_safetensors(tmp_path / "source", tiny_params(cfg), cfg))
    folder = convert(source, cfg, tmp_path / "split", group=32).path
    seen, exact = [], checks.load_target
    monkeypatch.setattr(
        checks, "load_target", lambda *a, check: seen.append(check) or exact(*a, check=check)
    )
    flags = ["--converted", str(folder), "--repeats", "2", "--resident", "1", *cold]
    assert checks.cli([*flags, "--output", str(tmp_path / "out.jsonl")]) == 0
    assert seen == [False, True, True, False, False, True]
    (record,) = lines(tmp_path / "out.jsonl")
    assert record["case"] == ("load from the disk" if cold else "load from the page cache")
    assert record["bytes"] == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert record["ratio"] == pytest.approx(record["checked_s"] / record["unchecked_s"])
    assert 0 < record["checked_s"] <= record["median_checked_s"]


@pytest.mark.parametrize("flags", [[], ["--file", "x", "--repeats", "0"]])
def test_what_cannot_be_timed_is_said(flags, capsys):
    assert checks.cli(flags) == 2
    assert ("nothing to time" if not flags else "--repeats is 0") in capsys.readouterr().err
