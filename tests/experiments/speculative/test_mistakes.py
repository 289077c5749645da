"""What the command refuses: one line that says why, and status 2."""

import dataclasses
import json
import typing

import pytest
from command import BASE, call

from experiments.common.cli import UserError
from experiments.speculative import benchmarks
from experiments.speculative.flags import Speculative
from experiments.speculative.run import Run
from subspec_jax.memory import parse_bytes

ERRORS = {
    # name -> flags ({target} stands for a folder), what the message must say
    "unknown model": ("--model qwen2.5-7c", "no model is named 'qwen2.5-7c'; did you mean"),
    "no such path": ("--checkpoint /absent/model", "/absent/model does not exist"),
    "no checkpoint": ("--checkpoint {empty}", "it holds nothing; expected config.json"),
    "truncated": ("--checkpoint {truncated}", "model.safetensors is truncated or corrupt"),
    "truncated file": ("--checkpoint {truncated-gguf}", "truncated"),
    "random of a file": ("--checkpoint {target} --weights random", "drop one of them"),
    "too little memory": ("{} --memory-limit 100KB", "the least that works is"),
    "no memory": ("{} --memory-limit 8", "'8' is not an amount of memory"),
    "nonsense memory": ("{} --memory-limit lots", "write for example 8GB"),
    "resident": ("{} --resident 7", "7 resident layers were asked for; the model has 3"),
    "ahead": ("{} --ahead 0", "at least one layer must be on its way"),
    "chunk": ("{} --chunk 0", "must be at least 1"),
    "tree of a replay": ("{} --depth auto --replay-acceptance x", "whatever the tree"),
    "tree sharpen": ("{} --sharpen 0", "sharpen is 0.0"),
    "tree depth": ("{} --depth -1", "tree depth is -1"),
    "tree width": ("{} --width 0", "tree width is 0"),
    "tree budget": ("{} --budget 4", "a node budget is for best-first trees"),
    "tree step": ("{} --tree best-first --budget 1", "budget 1 is less than one step"),
    "no tree": ("{} --depth 0 --compare best-first", "budget 0 is less than one step"),
    "below the tree": ("{} --post-speculation -1", "tree extra is -1"),
    "lookup": ("{} --lookup -1", "tree lookup is -1"),
    "lookup ahead": ("{} --lookup 4 --post-speculation 2", "set lookup or extra to 0"),
    "stop gain": ("{} --stop-gain abc", "--stop-gain is 'abc'; expected auto or a number"),
    "negative gain": ("{} --stop-gain -0.5", "--stop-gain is '-0.5'"),
    "n-gram": ("{} --ngram 0", "--ngram is 0"),
    "top-p": ("{} --top-p 2", "top_p is 2.0"),
    "temperature": ("{} --temperature -1", "temperature is -1.0"),
    "gate threshold": ("{} --gate-threshold 1.5", "the gate's threshold is 1.5"),
    "gate window": ("{} --gate-window 0", "the gate's window is 0"),
    "seed": ("{} --seed -1", "--seed is -1"),
    "empty stop": ("{} --stop ''", "--stop has an empty text"),
    "empty prompt": ("{} --prompt ' '", "the prompt is empty"),
    "two prompts": ("{} --prompt a --benchmark texts", "drop one of them"),
    "system of a text": ("{} --system a --benchmark texts", "--system would begin"),
    "stop of a replay": ("{} --stop a --replay-acceptance x", "drop --stop"),
    "samples": ("{} --samples 0", "must be at least 1"),
    "no tokens": ("{} --max-new-tokens 0", "must be at least 1"),
    "tokens": ("{} --max-new-tokens 193", "leaves no room for a prompt in --max-length 192"),
    "group": ("{} --draft-group 40", "q has 64 inputs, not a multiple of group 40"),
    "group of 12": ("{} --draft-group 12", "must be a multiple of 8"),
    "larger vocabulary": (
        "{} --compare classic --draft-checkpoint {larger}",
        "a vocabulary of 320 and the model one of 288",
    ),
    "other tokens": ("{} --compare classic --draft-checkpoint {cut}", "different tokens"),
    "no draft model": ("{} --compare classic", "name it with --draft-model"),
    "no draft": ("{} --draft-checkpoint /absent/draft", "/absent/draft does not exist"),
    "random draft": (
        "--model qwen2.5-7b --weights random --draft-checkpoint {small}",
        "--weights random takes --draft-model",
    ),
    "replay checked": ("{} --replay-acceptance published --check-lossless", "cannot be checked"),
    "replay text": ("{} --replay-acceptance published --method ngram", "drafts from the text"),
    "replay lookup": ("{} --replay-acceptance published --lookup 4", "--lookup drafts from the"),
    "no trace": ("{} --replay-acceptance /absent.jsonl", "/absent.jsonl is no acceptance trace"),
    "no published": (
        "{} --replay-acceptance published --compare best-first",
        "no published acceptance trace for the method best-first",
    ),
    "no benchmark": ("{} --benchmark mt-bench --data-dir {empty}", "no data for benchmark"),
    "no data": ("{} --benchmark mt-bench --data-dir /absent", "is not a directory"),
    "output": ("{} --output {gguf}", "cannot be made"),
    "residuals where": ("{} --stream residual", "needs --converted FOLDER"),
    "converted for nothing": ("{} --converted {empty}", "need --stream residual"),
    "verified for nothing": ("{} --verify-weights", "need --stream residual"),
    "unchecked for nothing": ("{} --no-check-files", "needs --stream residual or --palu"),
    "wide residuals": (
        "{} --stream residual --converted x --dtype float32",
        "residuals are of 16-bit weights",
    ),
    "low-rank residuals": (
        "{} --stream residual --converted x --palu {empty}",
        "residuals are of plain layers",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_mistake_gets_one_line_and_status_2(models, monkeypatch, tmp_path, name):
    def nowhere(spec):
        raise benchmarks._Unavailable("no network in this test")

    monkeypatch.setattr(benchmarks, "_hub", nowhere)
    monkeypatch.setattr(benchmarks, "_tfds", nowhere)
    monkeypatch.chdir(tmp_path)
    flags, message = ERRORS[name]
    flags = flags.replace("{}", "--checkpoint {target}")
    for key, path in models.items():
        flags = flags.replace(f"{{{key}}}", str(path))
    found = call(f"{BASE} {flags}")
    assert found.code == 2
    assert message in found.err
    assert found.err.startswith("error: ") and found.err.count("error:") == 1
    assert "Traceback" not in found.out + found.err
    details = ("truncated", "truncated file", "no benchmark")
    assert len(found.err.splitlines()) == 1 or name in details
    assert not list(tmp_path.rglob("*.jsonl"))


EXTREME = ("-1", "0", "1e-38", str(10**9), str(10**20), "1e300", "nan", "inf", "-inf", "")
NUMBERS = [
    f.name.replace("_", "-")
    for f in dataclasses.fields(Speculative)
    if (typing.get_args(f.type) == () and f.type in (int, float))
    or {int, float} & set(typing.get_args(f.type))
    or f.name in ("depth", "width", "stop_gain", "memory_limit")
]


@pytest.mark.quick_cases("seed", "ahead", "chunk", "temperature", "memory-limit")
@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_is_too_odd_for_a_flag(models, monkeypatch, tmp_path, name):
    """It is refused on one line, or planned with; nothing is allocated, nothing hangs."""

    def planned(self):
        raise UserError("planned")

    monkeypatch.setattr(Run, "prepare", planned)
    for value in EXTREME:
        found = call(f"{BASE} --checkpoint {models['target']} --output {tmp_path} --{name}={value}")
        assert found.code == 2, (value, found)
        if found.err.startswith("error: "):
            assert len(found.err.splitlines()) == 1, value
        else:
            assert f"--{name}" in found.err and "Traceback" not in found.err, value
    assert len(NUMBERS) > 20


@pytest.mark.parametrize(
    "flags", ["--draft-bits 5", "--method nosuch", "--samples x", "--gate length"]
)
def test_flags_that_cannot_be_read_are_explained(models, flags):
    found = call(f"--checkpoint {models['target']} {flags}")
    assert found.code == 2
    assert flags.split()[0] in found.err and "Traceback" not in found.err


@pytest.mark.slow
def test_the_least_memory_that_is_named_is_enough(run, models, tmp_path):
    small = f"{BASE} --checkpoint {models['target']} --memory-limit 100KB"
    least = call(small).err.split("the least that works is ")[1].split()[0]
    assert parse_bytes(least) > 100 * 2**10
    found = run(f"--memory-limit {least} --compare --no-show", tmp_path)
    assert [r["method"] for r in found.records] == ["subspec"]


def test_a_prompt_that_does_not_fit_is_skipped_with_a_word(run, tmp_path):
    found = run("--max-new-tokens 90 --method vanilla --compare", tmp_path)
    assert "skipped writing-1 turn 0: 125 prompt tokens and 90 new ones exceed" in found.out
    assert found.records == []
    assert json.loads((tmp_path / "run.json").read_text())["summaries"] == []
