"""Replaying recorded trees: what rules and shapes would have yielded, against counting by hand."""

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import matplotlib.image
import numpy as np
import pytest

from experiments.common import records
from experiments.measure import stop_rules, tree_trace
from experiments.measure import trees as tree_shape
from llm_jax.testing import tiny_config, tiny_params, write_safetensors
from subspec_jax.propose import Round
from subspec_jax.shape import TreeCosts
from subspec_jax.tree import TreeSpec

COSTS = TreeCosts({2: 0.1}, {9: 1.0}, 0.5)
GAINS = (-0.001, -0.1, -1.0, -3.0)
TRACE = Path(__file__).parents[3] / "experiments" / "results" / "cpu_smollm2_trees.jsonl"


def tree(accepted, gains=GAINS):
    path = tuple(1 + 2 * l for l in range(accepted))
    return Round([], accepted, drafted=8, depth=4, path=path, gains=gains)


def test_rules_pay_for_what_they_draft():
    text = stop_rules.Text([tree(3), tree(0), tree(4)])
    replay = lambda rule: stop_rules.replay(text, rule, COSTS, 2).tolist()
    assert replay(stop_rules.Fixed(4)) == pytest.approx([10, 3 * 1.9, 12, 3])
    assert replay(stop_rules.Fixed(2)) == pytest.approx([3 + 1 + 3, 3 * 1.7, 6, 3])
    assert replay(stop_rules.Oracle()) == pytest.approx([10, 3 * 1.5 + 0.8, 8, 3])


def test_a_rule_goes_on_where_it_stopped():
    """With a tree for every position, n tokens lead to the n-th tree behind."""
    text = stop_rules.Text([tree(4), tree(9), tree(1), tree(0), tree(2)], every=True)
    # two levels: 3 tokens from tree 0, 1 token from tree 3, 3 from tree 4
    got = stop_rules.replay(text, stop_rules.Fixed(2), COSTS, 2)
    assert got.tolist() == pytest.approx([7, 3 * 1.7, 6, 3])


def test_a_trace_counts_as_often_as_a_run_would_come_by():
    trees = [tree(2), tree(1), tree(0), tree(4)]
    assert stop_rules.visited(stop_rules.Text(trees)) == trees
    # from 0: trees 0, 3; from 1: 1, 3; from 2: 2, 3; from 3: 3
    found = stop_rules.visited(stop_rules.Text(trees, every=True))
    assert [trees.index(t) for t in found] == [0, 3, 1, 3, 2, 3, 3]


def test_the_uncalibrated_rule_compares_the_sum_with_the_average():
    rule, text = stop_rules.Uncalibrated(), tree(1)
    assert rule.levels(text) == (4, 4)
    rule.learn(text, 4, 2, 0.4, 1.0)  # 0.1 s a step, 2 tokens/s: 0.2 tokens a step
    assert rule.levels(text) == (3, 4)  # exp(-1) is more, exp(-3) is less
    rule.learn(text, 4, 30, 0.4, 1.0)
    assert rule.levels(text) == (2, 3)


def test_the_calibrated_rule_is_the_drafts_own():
    rule = stop_rules.Calibrated(4)
    assert rule.levels(tree(4)) == (4, 4)
    for _ in range(40):
        rule.learn(tree(2), 4, 3, 0.4, 1.0)
    levels, steps = rule.levels(tree(4))
    least_L = rule.stop.least_gain_L()
    assert levels == steps < 4 and GAINS[levels - 1] <= least_L[levels - 1]
    assert all(GAINS[l] > least_L[l] for l in range(levels - 1))


def test_the_recorded_trace_says_that_calibration_pays():
    """192 trees of SmolLM2, an H200's costs: the numbers of experiments/results."""
    texts = stop_rules.texts_of(records.read(TRACE), "subspec")
    found = stop_rules.compare_rules(texts, TreeCosts({6: 2.2e-3}, {289: 0.075}, 3e-3), 6, starts=4)
    rate = {line["rule"].split(",")[0]: line["tokens_per_s"] for line in found[:4] + found[5:]}
    whole, best = (rate[name] for name in list(rate)[:2])
    assert whole < rate["uncalibrated"] < best < rate["calibrated"] < rate["oracle"]


# --- Commands ----------------------------------------------------------------------------------


def call(module, *flags):
    """(exit code, standard output, standard error) of a command run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = module.cli([*map(str, flags)])
        except SystemExit as stopped:
            code = stopped.code
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def trace(tmp_path):
    """Two texts of ten positions, as tree_trace writes them, without times."""
    accepted = [3, 0, 4, 1, 2, 4, 4, 0, 1, 3]
    columns = {
        "accepted": accepted,
        "drafted": [8] * 10,
        "depth": [4] * 10,
        "path": [list(tree(n).path) for n in accepted],
        "gains": [GAINS] * 10,
    }
    for sample in ("a", "b"):
        about = {"method": "subspec", "sample": sample, "turn": 0, "every_position": True}
        records.append(tmp_path / "trace.jsonl", about | {"rounds": columns})
    return tmp_path / "trace.jsonl"


def test_a_tree_is_judged_by_the_text_behind_its_root():
    """0 -> 1 (token 5), 2 (token 6); 1 -> 3 (token 7); 2 -> 4 (token 7)."""
    spec = TreeSpec("beam", 2, 2)
    drafted = SimpleNamespace(
        parent_E=np.array([-1, 0, 0, 1, 2]), token_E=np.array([9, 5, 6, 7, 7]),
        depth_E=np.array([0, 1, 1, 2, 2]), score_E=np.log([1, 0.5, 0.25, 0.25, 0.125]),
    )  # fmt: skip
    found = tree_trace.judged(drafted, [6, 7, 8], spec)
    assert (found["accepted"], list(found["path"])) == (2, [2, 4])
    assert (found["drafted"], found["depth"], len(found["gains"])) == (4, 2, 2)
    assert tree_trace.judged(drafted, [5, 8, 8], spec)["path"] == (1,)
    assert tree_trace.judged(drafted, [7, 5, 8], spec)["accepted"] == 0


@pytest.mark.slow
def test_a_trace_has_a_tree_for_every_position(tmp_path):
    """A tiny model drafts with itself in 8 bits; trees then reads the trace."""
    cfg = tiny_config("qwen2", layers=2)
    model = write_safetensors(tmp_path / "model", tiny_params(cfg), cfg)
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        code, _, err = call(
            tree_trace, tmp_path / "trace.jsonl", "--checkpoint", model, "--benchmark", "builtin",
            "--samples", 2, "--tokens", 14, "--depth", 4, "--width", 2, "--batch", 4,
            "--draft-bits", 8, "--draft-group", 16, "--max-length", 192,
        )  # fmt: skip
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    assert code == 0, err
    found = records.read(tmp_path / "trace.jsonl")
    assert found and all(r["every_position"] for r in found)
    for r in found:
        rounds = r["rounds"]
        assert {len(column) for column in rounds.values()} == {10}
        assert set(rounds["drafted"]) == {8} and set(rounds["depth"]) == {4}
        assert [len(path) for path in rounds["path"]] == rounds["accepted"]
        assert all(len(gains) == 4 for gains in rounds["gains"])
    accepted = np.concatenate([r["rounds"]["accepted"] for r in found])
    assert accepted.mean() > 2  # of 4, because the draft is almost the target
    code, out, _ = call(tree_shape, tmp_path / "trace.jsonl", "--draft-ms", 2, "--verify-ms", 70)
    assert code == 0 and "best: --depth" in out


def test_the_command_names_flags_and_writes_what_it_says(trace, tmp_path):
    plot, lines = tmp_path / "map.png", tmp_path / "lines.jsonl"
    flags = ("--draft-ms", 2, "--verify-ms", 70, "--stop-rules", "--plot", plot, "--output", lines)
    code, out, err = call(tree_shape, trace, *flags)
    assert (code, err) == (0, "")
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    shape, rules = written[0], written[1:]
    assert f"--depth {shape['depth']} --width {shape['width']}, " in out
    assert [line["rule"] for line in rules][2:] == [
        *("uncalibrated", "calibrated", "calibrated, warm", "oracle")
    ]
    assert rules[0]["levels"] == 4 and rules[-1]["tokens_per_s"] >= rules[0]["tokens_per_s"]
    assert all(line["costs_ms"] == {"draft": 2, "verify": 70, "other": None} for line in written)
    assert min(matplotlib.image.imread(plot).shape[:2]) > 200


def test_a_trace_has_no_times(trace):
    code, _, err = call(tree_shape, trace, "--draft-ms", 2)
    assert code == 2 and "give --draft-ms and --verify-ms" in err


@pytest.mark.parametrize(
    "record, words",
    [
        (
            {"rounds": {"drafted": [4], "depth": [2]}},
            "of an older version, without",
        ),
        ({"rounds": {"drafted": [0], "path": [[]]}}, "no record of the method subspec has"),
        ({"method": "chain", "rounds": {}}, "no record of the method subspec has"),
    ],
)
def test_records_without_trees_are_refused(tmp_path, record, words):
    path = tmp_path / "records.jsonl"
    records.append(path, {"method": "subspec", "sample": "a", "turn": 0} | record)
    code, _, err = call(tree_shape, path)
    assert code == 2 and words in err
