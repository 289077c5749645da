import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from experiments.common import records
from experiments.speculative import plots, report

ROUNDS = ("emitted", "accepted", "drafted", "depth", "draft_s", "verify_s", "other_s")


def record(method="subspec", sample="81", turn=0, emitted=(3, 5), depth=4, **fields):
    """A turn of len(emitted) rounds: 10 ms draft, 80 ms verify, 10 ms other and 40 MB each."""
    n = len(emitted)
    drafts = method != "vanilla"
    rounds = {
        "emitted": list(emitted),
        "accepted": [e - 1 for e in emitted],
        "drafted": [6 * depth if drafts else 0] * n,
        "depth": [depth if drafts else 0] * n,
        "draft_s": [0.01 if drafts else 0.0] * n,
        "verify_s": [0.08] * n,
        "other_s": [0.01] * n,
        "streamed_bytes": [40_000_000] * n,
        "pass_bytes": [32_000_000] * n,
    }
    return {
        "method": method,
        "benchmark": "mt-bench",
        "sample": sample,
        "turn": turn,
        "category": "writing",
        "prompt_tokens": 40,
        "token_ids": [7] * (1 + sum(emitted)),
        "text": "…",
        "prefill_s": 0.5,
        "decode_s": 0.1 * n,
        "peak_bytes": 2**30,
        "replayed": False,
        "settings": "abc",
        "rounds": rounds,
        "lossless": None,
    } | fields


def different(at, gap, tolerance):
    keys = ("identical", "first_difference", "logit_gap", "tolerance")
    return dict(zip(keys, (False, at, gap, tolerance)))


SAME = dict(different(None, None, None), identical=True)


def shown(summaries, width=100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        report.print_summary(console, summaries)
        return console.export_text()


# --- Records on disk ---------------------------------------------------------------------------


def test_records_come_back_as_written(tmp_path):
    path = tmp_path / "new" / "records.jsonl"
    written = [record(sample=str(i), text=f"é\n\u2028{i}") for i in range(3)]
    for r in written:
        records.append(path, r)
    assert records.read(path) == written
    assert len(path.read_bytes().splitlines()) == 3
    assert records.read(tmp_path / "absent.jsonl") == []


def test_arrays_become_lists_and_not_a_number_null(tmp_path):
    path = tmp_path / "records.jsonl"
    extra = {"a": np.int32(3), "b": np.arange(3), "c": math.nan, "d": (np.float32(0.5), True)}
    records.append(path, record(extra=extra))
    assert records.read(path)[0]["extra"] == {"a": 3, "b": [0, 1, 2], "c": None, "d": [0.5, True]}
    with pytest.raises(TypeError, match="object"):
        records.append(path, record(extra=object()))
    assert len(records.read(path)) == 1  # what cannot be written leaves the file as it was


def test_every_possible_torn_last_line_is_dropped_and_then_overwritten(tmp_path, caplog):
    path = tmp_path / "records.jsonl"
    first, second = record(sample="1", text="é"), record(sample="2")
    records.append(path, first)
    whole = path.read_bytes()
    line = json.dumps(second).encode()
    for cut in range(1, len(line), 7):
        path.write_bytes(whole + line[:cut])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert records.read(path) == [first]
        assert "line 2" in caplog.text and "run again" in caplog.text
        records.append(path, second)
        assert records.read(path) == [first, second]
        assert path.read_bytes() == whole + line + b"\n"


def test_a_last_line_that_only_lacks_its_newline_is_kept(tmp_path, caplog):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(record(sample="1")))
    assert [r["sample"] for r in records.read(path)] == ["1"]
    records.append(path, record(sample="2"))
    assert [r["sample"] for r in records.read(path)] == ["1", "2"]
    assert not caplog.records


def test_a_torn_first_line(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"method": "subsp')
    assert records.read(path) == []
    records.append(path, record())
    assert records.read(path) == [record()]


@pytest.mark.parametrize("line", [b"\x00\x00\x00", b"{", b"[1]", b'{"method": "m"}', b"\xff"])
def test_damage_in_the_middle_names_file_and_line(tmp_path, line):
    path = tmp_path / "records.jsonl"
    good = json.dumps(record()).encode()
    path.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    with pytest.raises(records.RecordError, match=r"records\.jsonl, line 2: not a record"):
        records.read(path)


def test_a_killed_writer_leaves_a_file_to_resume_from(tmp_path):
    """A process killed between two appends, with a torn third: two turns are done."""
    path = tmp_path / "records.jsonl"
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom experiments.common import records\n"
        "path = Path(sys.argv[1])\n"
        "for i in range(2):\n"
        "    records.append(path, {'method': 'm', 'sample': str(i), 'turn': 0, 'settings': 's'})\n"
        "with path.open('ab', buffering=0) as f:\n"
        '    f.write(b\'{"method": "m", "sam\')\n'
        "    os.kill(os.getpid(), 9)\n"
    )
    root = Path(records.__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code, str(path)], cwd=root, check=False)
    assert run.returncode == -9
    assert [(r["sample"], r["settings"]) for r in records.read(path)] == [("0", "s"), ("1", "s")]


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(sample=["81"]), "sample is ['81'], expected a text"),
        (dict(settings=None), "settings is None, expected a text"),
        (dict(decode_s="1"), "decode_s is '1', expected a number"),
        (dict(decode_s=None), "decode_s is None, expected a number"),  # was NaN
        (dict(token_ids=[1, 2.5]), "token_ids is not a list of whole numbers"),
        (dict(rounds=[]), "rounds is [], expected an object of lists"),
        (dict(rounds={}), "rounds.emitted is not a list of numbers"),
        (dict(rounds=record()["rounds"] | {"depth": ["4", 4]}), "rounds.depth is not a list of n"),
        (dict(rounds=record()["rounds"] | {"depth": [4]}), "the lists of rounds are not of one"),
        (dict(lossless=True), "lossless is True, expected null or an object"),
    ],
)
def test_a_record_of_wrong_types_is_named_with_its_line(tmp_path, change, words):
    path = tmp_path / "records.jsonl"
    for row in (record(), record(turn=1) | change):
        records.append(path, row)
    assert report.problem(record()) is None
    with pytest.raises(records.RecordError) as caught:
        records.read(path, problem=report.problem)
    assert f"{path}, line 2: {words}" in str(caught.value)


def test_write_json_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "run.json"
    records.write_json(path, {"a": [1, np.float32(0.5), Path("x")], "b": math.inf})
    assert json.loads(path.read_text()) == {"a": [1, 0.5, "x"], "b": None}
    with pytest.raises(TypeError):
        records.write_json(path, {"a": object()})
    assert json.loads(path.read_text())["b"] is None
    assert list(tmp_path.iterdir()) == [path]  # no scratch files


def test_environment_is_plain_json():
    found = records.environment()
    assert json.loads(json.dumps(found)) == found
    assert found["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert found["packages"]["numpy"] == np.__version__
    assert found["time"].endswith("+00:00")
    assert found["commit"] is None or len(found["commit"]) >= 40


def test_commit_of_a_folder_that_is_no_checkout(tmp_path):
    assert records._commit(tmp_path) == {"commit": None, "modified": None}


# --- Summaries ---------------------------------------------------------------------------------


def test_summary_by_hand():
    # 3 + 5 and 8 tokens in 3 passes of 0.1 s; vanilla: 4 + 2 tokens in 6 passes of 0.1 s.
    rows = [
        record(emitted=(3, 5), peak_bytes=5),
        record(sample="82", emitted=(8,), peak_bytes=9),
        record("vanilla", emitted=(1,) * 4),
        record("vanilla", sample="82", emitted=(1,) * 2),
    ]
    subspec, vanilla = report.summarize(rows)
    assert (subspec["samples"], subspec["turns"]) == (2, 2)
    assert (subspec["tokens"], subspec["passes"]) == (16, 3)
    assert subspec["tokens_per_s"] == pytest.approx(16 / 0.3)
    assert subspec["tau"] == pytest.approx(16 / 3)
    assert subspec["draft_share"] == pytest.approx(0.1)
    assert subspec["verify_s"] == pytest.approx(0.24)
    assert subspec["draft_ms_per_round"] == pytest.approx(10)
    assert subspec["bytes_per_token"] == pytest.approx(3 * 40e6 / 16)
    assert subspec["stream_gb_per_s"] == pytest.approx(3 * 0.032 / 0.24)
    assert subspec["peak_bytes"] == 9
    assert subspec["prefill_tokens_per_s"] == pytest.approx(80)
    assert subspec["speedup"] == pytest.approx((16 / 0.3) / 10)
    assert vanilla["tokens_per_s"] == pytest.approx(10)
    assert vanilla["speedup"] == pytest.approx(1)
    assert vanilla["tau"] == 1 and vanilla["draft_share"] == 0


def test_totals_not_means_of_ratios():
    rows = [record(emitted=(9,)), record(sample="82", emitted=(1,) * 9)]
    (summary,) = report.summarize(rows)
    assert summary["tau"] == pytest.approx(18 / 10)  # the mean of 9 and 1 would be 5
    assert summary["tokens_per_s"] == pytest.approx(18)  # and of 90 and 10, 50


def test_speedup_is_over_the_turns_both_decoded():
    rows = [
        record(emitted=(2, 2)),  # 20 tokens/s, as vanilla did too
        record(sample="82", emitted=(50, 50)),  # an easy one, without a baseline
        record("vanilla", emitted=(1,) * 4),
    ]
    summary = report.summarize(rows)[0]
    assert summary["speedup"] == pytest.approx(2)
    assert summary["tokens_per_s"] == pytest.approx(104 / 0.4)
    assert "subspec 1 of 2" in "\n".join(report.summary_notes([summary, report.summarize(rows)[1]]))


@pytest.mark.parametrize("others", [[], [record("vanilla", sample="99")]])
def test_no_speedup_without_a_common_baseline(others):
    assert report.summarize([record(), *others])[0]["speedup"] is None


def test_nothing_to_divide_by():
    empty = record(emitted=(), prefill_s=0.0, decode_s=0.0, peak_bytes=None)
    (summary,) = report.summarize([empty])
    for name in ("tokens_per_s", "tau", "draft_share", "bytes_per_token", "stream_gb_per_s"):
        assert summary[name] is None, name
    assert summary["speedup"] is None and summary["peak_bytes"] is None
    assert summary["prefill_tokens_per_s"] is None
    assert "subspec" in shown([summary])
    assert report.summarize([]) == []
    shown([])


def test_lossless_in_words():
    rows = [record(sample=str(i), lossless=SAME) for i in range(12)]
    assert report.summarize(rows)[0]["lossless"] == "12/12 identical"
    rows[3]["lossless"] = different(37, 0.003, 0.02)
    rows[5]["lossless"] = different(4, 0.5, 0.02)
    text = report.summarize(rows)[0]["lossless"]
    assert text.startswith("10/12 identical; first differences: sample 3 turn 0 at token 37")
    assert "0.003, within the tolerance 0.02" in text
    assert "0.5, BEYOND the tolerance 0.02" in text
    assert report.summarize([record()])[0]["lossless"] is None


def test_many_differences_are_cut_short():
    rows = [record(sample=str(i), lossless=different(i, None, None)) for i in range(9)]
    text = report.summarize(rows)[0]["lossless"]
    assert text.startswith("0/9 identical") and text.endswith("6 more")


# --- Table -------------------------------------------------------------------------------------


def test_table_fits_into_100_columns_and_loses_nothing():
    rows = [record("vanilla", emitted=(1,) * 40, lossless=None)]
    big = {"prompt_tokens": 123_456, "peak_bytes": 79 * 2**30, "lossless": SAME}
    rows += [
        record("specexec-16bit", sample=str(i), emitted=(1000,) * 99, **big) for i in range(100)
    ]
    text = shown(report.summarize(rows))
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    for part in ("9900000", "100/100", "246912", "tok/s", "GiB", "GB/s", "79.0", "10/80/10"):
        assert part in text


def test_method_names_are_no_markup():
    assert "[red]x" in shown(report.summarize([record("[red]x")]))


def test_notes_tell_the_truth():
    rows = [
        record("vanilla", emitted=(1, 1)),
        record("slow", emitted=(1,) * 4, decode_s=0.9),
        record("fast", emitted=(4, 4), replayed=True),
    ]
    text = shown(report.summarize(rows))
    assert "replayed acceptance: the engine was timed, the text is meaningless" in text
    assert "slow is slower than vanilla on this device" in text
    assert "fast is slower" not in text and "fast*" in text
    assert "no vanilla run" in shown(report.summarize(rows[1:]))


def test_notes_on_mixed_settings_and_cut_tokens():
    rows = [record(), record(sample="82", settings="other", token_ids=[1] * 4)]
    text = "\n".join(report.summary_notes(report.summarize(rows)))
    assert "2 different settings" in text
    assert "4 tokens were counted but cut" in text  # 3 + 5 emitted, 4 in the text


def test_quiet_when_all_is_well():
    rows = [record("vanilla", emitted=(1,) * 8), record(emitted=(4, 4), lossless=SAME)]
    assert report.summary_notes(report.summarize(rows)) == []


@pytest.mark.parametrize(
    "value, text",
    [(None, "-"), (0, "0"), (0.1234, "0.123"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1234"),
     (9.999, "10.0"), (99.99, "100"), (0.99999, "1.00")],
)  # fmt: skip
def test_numbers_keep_three_digits(value, text):
    assert report._number(value) == text


# --- Plots -------------------------------------------------------------------------------------


def test_acceptance_by_depth_by_hand():
    # Three rounds reach level 2, one of them level 3; accepted 0, 2, 3.
    assert plots.acceptance([0, 2, 3], [2, 2, 3]) == [(1, 3, 2), (2, 3, 2), (3, 1, 1)]
    assert plots.acceptance([], []) == []


@pytest.mark.parametrize("hits, trials", [(0, 10), (5, 10), (10, 10), (37, 200)])
def test_wilson_interval_solves_its_equation(hits, trials):
    """Its ends are the p with |hits/trials - p| = z sqrt(p (1 - p) / trials)."""
    low, high = plots.wilson(hits, trials)
    share = hits / trials
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(share - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / trials))


def pixels(path):
    from matplotlib.image import imread

    return imread(path)[..., :3]


def test_plots_are_drawn(tmp_path):
    rng = np.random.default_rng(0)
    rows = [record("vanilla", emitted=(1,) * 30)]
    for method, rate in (("subspec", 0.05), ("ngram", 0.5)):
        emitted = np.minimum(rng.geometric(rate, 60), 17).tolist()
        rows.append(record(method, emitted=emitted, depth=16, replayed=method == "ngram"))
    paths = report.plots(rows, tmp_path / "plots")
    assert [p.name for p in paths] == [
        "accepted_length.png", "acceptance_by_depth.png", "time_per_round.png",
    ]  # fmt: skip
    assert sorted((tmp_path / "plots").iterdir()) == sorted(paths)  # no scratch files
    for path in paths:
        image = pixels(path)
        assert min(image.shape[:2]) > 300
        assert 0.02 < (image < 0.95).any(-1).mean() < 0.8  # neither blank nor full
        coloured = np.ptp(image, axis=-1) > 0.3
        assert coloured.mean() > 0.002


def test_plots_show_the_data(tmp_path):
    """Other records, other pictures."""
    first = [p.read_bytes() for p in report.plots([record(emitted=(1, 5))], tmp_path / "a")]
    again = [p.read_bytes() for p in report.plots([record(emitted=(1, 5))], tmp_path / "b")]
    other = [p.read_bytes() for p in report.plots([record(emitted=(3, 4))], tmp_path / "c")]
    assert first == again
    assert all(a != b for a, b in zip(first, other))


@pytest.mark.parametrize(
    "rows, names",
    [
        ([], []),
        ([record(emitted=())], []),
        ([record("vanilla", emitted=(1, 1))], ["time_per_round.png"]),
    ],
)
def test_plots_without_data_are_left_out(tmp_path, rows, names):
    assert [p.name for p in report.plots(rows, tmp_path)] == names


def test_modules_need_no_jax():
    code = (
        "import sys\nsys.modules['jax'] = None\n"
        "from experiments.speculative import benchmarks, report\n"
        "benchmarks.load_conversations('builtin')\n"
        "assert 'matplotlib' not in sys.modules"
    )
    root = Path(records.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
