"""What `experiments.palu` is given and cannot use: flags, places, records, texts, tasks."""

import dataclasses
import gzip
import json
import math
import os
import typing

import numpy as np
import pytest
from rich.console import Console

from experiments.common.cli import UserError
from experiments.common.records import RecordError, read
from experiments.palu import __main__ as palu
from experiments.palu import corpora, evaluate, report
from experiments.palu.corpora import CorpusError
from experiments.palu.flags import WHOLE, FlagError, Palu, check
from experiments.palu.run import PaluRun, output_folder
from llm_jax.files import LockedError, locked
from llm_jax.testing import tiny_config, tiny_params, write_safetensors

CFG = tiny_config("qwen2", kv_heads=2)
PARAMS = tiny_params(CFG)


def quiet():
    return Console(quiet=True)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_have_ranges(name):
    least, most = WHOLE[name]
    for value in (least, most):
        check(Palu(**{name: value}))
    for value in (least - 1, most + 1, -1, 10**20):
        with pytest.raises(FlagError, match=f"^--{name.replace('_', '-')} is {value}; expected"):
            check(Palu(**{name: value}))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, -math.inf, 1e400])
def test_numbers_must_be_finite_and_above_0(value):
    for name, flags in {
        "keep": dict(keep=(0.5, value)),
        "budget": dict(budget=(value,)),
        "split": dict(split=(1.0, value)),
        "slowest": dict(slowest=value, budget=(0.3,)),
    }.items():
        with pytest.raises(FlagError, match=f"^--{name} is {value}; expected"):
            check(Palu(**flags))


CHOICES = {"bits": True, "key_bits": False, "value_bits": False, "classes": True}
"""Flags with a few numbers -> whether they take several."""


@pytest.mark.parametrize("value", [0, -1, -4, 5, math.nan, math.inf, 2.5])
@pytest.mark.parametrize("name", CHOICES)
def test_numbers_of_a_few_choices(name, value):
    given = (2, value) if CHOICES[name] else value
    with pytest.raises(FlagError, match=f"^--{name.replace('_', '-')} is {value}; expected one of"):
        check(Palu(**{name: given}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_are_finite(name, value):
    with pytest.raises(FlagError, match=f"^--{name.replace('_', '-')} is {value}; expected"):
        check(Palu(**{name: value}))


def test_these_are_all_numbers():
    """A new numeric flag fails here until `check` and the tests above know it."""
    known = {*WHOLE, *CHOICES, "keep", "budget", "split", "slowest"}
    numeric = {
        name
        for name, kind in typing.get_type_hints(Palu).items()
        if any(leaf in (int, float) or type(leaf) in (int, float) for leaf in leaves(kind))
    }
    assert numeric == known


def leaves(kind) -> list:
    """The types and choices that make up a type, such as int in tuple[int, ...] | None."""
    inner = typing.get_args(kind)
    return [leaf for part in inner for leaf in leaves(part)] if inner else [kind]


MAY_BE_0 = {name for name, (least, _) in WHOLE.items() if least == 0}


@pytest.mark.parametrize("word", ["0", "-1", "nan"])
def test_words_of_the_command_line(word, tmp_path, capfd):
    """Every number of every flag, through the parser: status 2, and the flag in the message."""
    for name in [*WHOLE, *CHOICES, "keep", "budget", "split", "slowest"]:
        if word == "0" and name in MAY_BE_0:
            continue
        flag = "--" + name.replace("_", "-")
        words = [flag, *(["1"] if name == "split" else []), word, "--output", str(tmp_path / "new")]
        try:
            status = palu.cli(words)
        except SystemExit as exit:  # the parser's
            status = exit.code
        assert status == 2 and flag in "".join(capfd.readouterr()), name
    assert not (tmp_path / "new").exists()


def test_flags_that_ask_for_nothing(tmp_path):
    for name in ("bits", "granularity", "objective", "search"):
        with pytest.raises(FlagError, match=f"--{name} is empty"):
            check(Palu(**{name: ()}))
    for flags in (dict(preset="none"), dict(rivals=("int4",))):
        with pytest.raises(FlagError, match="no flag asks for one"):
            check(Palu(save=tmp_path / "new", **flags))
    check(Palu(save=tmp_path / "new", preset="paper", rivals=("int4",)))


def test_the_output_folder_has_a_name_of_its_own():
    name = output_folder(Palu(model="a/../b", evaluation="/some/where/my text.txt")).name
    assert name.startswith("palu-a_.._b-my_text.txt-")
    assert len(output_folder(Palu(evaluation="x" * 400)).name) <= 200


def test_places_are_tried_before_any_work(tmp_path):
    """No model is opened: this one does not exist."""
    nothing = dict(checkpoint=tmp_path / "none", keep=(0.5,))
    (tmp_path / "file").write_text("")
    for flags in (
        dict(output=tmp_path / "file"),
        dict(output=tmp_path / "file" / "out"),
        dict(output=tmp_path / "out", save=tmp_path / "file" / "stored"),
    ):
        with pytest.raises(OSError, match="file"):
            palu.main(Palu(**nothing | flags), quiet())
    with pytest.raises(FlagError, match="file exists"):
        palu.main(Palu(**nothing, save=tmp_path / "file"), quiet())
    with locked(tmp_path / "out"), pytest.raises(LockedError, match="another process"):
        palu.main(Palu(**nothing, output=tmp_path / "out"), quiet())


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A record as the command writes it."""
    folder = tmp_path_factory.mktemp("run")
    write_safetensors(folder / "model", PARAMS, CFG)
    args = Palu(
        checkpoint=folder / "model", output=folder / "out", dtype="float32", preset="none",
        tokens=16, context=16,
    )  # fmt: skip
    assert palu.main(args, quiet()) == 0
    return json.loads((folder / "out" / "records.jsonl").read_text())


@pytest.mark.parametrize(
    "change",
    [
        dict(settings=None),
        dict(settings=7),
        dict(kind=[]),
        dict(sample="other"),
        dict(sample=None),
        dict(result=None),
        dict(result=[]),
        dict(result=dict(perplexity=None, cache_bytes_per_token=1, tokens=1, context=1)),
        dict(result=dict(perplexity="3", cache_bytes_per_token=1, tokens=1, context=1)),
        dict(result=dict(perplexity=3.0)),
        dict(sample="retrieval-1x2", result=dict(accuracy=1)),
        dict(sample="task-copa-all", result=dict(acc="high")),
        dict(bf16_bytes_per_token=0),
        dict(bf16_bytes_per_token="many"),
        dict(rank_kept="all"),
        dict(search=3, kind="palu"),
        dict(keep=None),
        dict(rotate="yes"),
        dict(evaluation=3),
    ],
    ids=str,
)
def test_records_that_are_damaged_are_named(tmp_path, record, change):
    assert report.problem(record) is None
    lines = json.dumps(record) + "\n" + json.dumps(record | change) + "\n"
    (tmp_path / "records.jsonl").write_text(lines)
    with pytest.raises(RecordError, match=r"records\.jsonl, line 2: .* Delete the line"):
        PaluRun(Palu(), quiet(), tmp_path)


def test_records_of_another_model_are_not_used(tmp_path, record):
    """A model that differs in one number of its last matrix is measured again."""
    head = PARAMS.head_DV.at[-1, -1].add(1e-3)
    write_safetensors(tmp_path / "model", dataclasses.replace(PARAMS, head_DV=head), CFG)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "records.jsonl").write_text(json.dumps(record) + "\n")
    args = Palu(
        checkpoint=tmp_path / "model", output=tmp_path / "out", dtype="float32", preset="none",
        tokens=16, context=16,
    )  # fmt: skip
    assert palu.main(args, quiet()) == 0
    assert len(read(tmp_path / "out" / "records.jsonl")) == 2
    assert palu.main(args, quiet()) == 0
    assert len(read(tmp_path / "out" / "records.jsonl")) == 2


def test_a_loss_that_is_no_number_is_named(monkeypatch):
    windows = np.zeros((1, 4), np.int32)
    for value in (math.nan, math.inf):
        found = np.full((1, 3), value)
        monkeypatch.setattr(evaluate, "token_losses", lambda *_, a=found: (a, 1))
        with pytest.raises(UserError, match=f"the loss is {value}"):
            evaluate.perplexity(PARAMS, windows, CFG)


def text_of(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return corpora._documents(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": 3}\n', "line 1: not a JSON object with a text"),
        (b'{"text": "a"}\n{"prompt": ["b"]}\n', "line 2"),
        (b'{"prompt": null}', "line 1"),
        (b'"text"', "line 1"),
        (b"{", "line 1: not JSON"),
        (b"[" * 100_000, "line 1: not JSON"),
        (b"9" * 5000, "line 1: not JSON"),
        (b"\xff\xfe", "cannot be read as"),
        (gzip.compress(b"x" * 99)[:-9], "cannot be read as"),
        (gzip.compress(b"x" * 99)[:20] + b"\x00\xff" * 9, "cannot be read as"),
    ],
    ids=range(10),
)
def test_damaged_json_lines_are_named(tmp_path, content, words):
    with pytest.raises(CorpusError, match=words):
        text_of(tmp_path, "a.jsonl", content)


def test_texts_have_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "LARGEST", 1000)
    assert text_of(tmp_path, "a.txt", gzip.compress(b"x" * 1000)) == "x" * 1000
    for content in (b"x" * 1001, gzip.compress(b"x" * 1001)):
        with pytest.raises(CorpusError, match="more than 1000 bytes"):
            text_of(tmp_path, "a.txt", content)


def test_texts_that_no_tokenizer_reads_are_named(tmp_path):
    (tmp_path / "text/c4").mkdir(parents=True)
    (tmp_path / "text/c4/c4_en_sample.jsonl").write_text('{"text": "\\ud800"}')
    with pytest.raises(CorpusError, match="characters that UTF-8 lacks"):
        corpora.text("c4", "evaluation", tmp_path)
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "none"):
        with pytest.raises(CorpusError, match=r"neither a corpus .* nor a text file"):
            corpora.text(str(path), "evaluation")


def test_damaged_parquet_files_are_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pip install -e '.[eval]'")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    write = lambda **columns: parquet.write_table(pyarrow.table(columns), path)
    write(text=["one ", "two"])
    assert corpora._documents(path) == "one two"
    whole = path.read_bytes()
    for content in (b"", b"PAR1", whole[:-5], whole[: len(whole) // 2], b"text", whole[4:]):
        path.write_bytes(content)
        with pytest.raises(CorpusError, match="cannot be read as parquet"):
            corpora._documents(path)
    write(words=["one"])
    with pytest.raises(CorpusError, match="with a column text"):
        corpora._documents(path)
    for rows in ([None, "one"], [1, 2], [["one"]]):
        write(text=rows)
        with pytest.raises(CorpusError, match=r"row 0: .* in place of a text"):
            corpora._documents(path)


@pytest.mark.parametrize(
    "row",
    [
        dict(),
        dict(key="a"),
        dict(key="a", ordered_kv_records=3),
        dict(key="a", ordered_kv_records=[["b", "c"]]),
        dict(key="a", ordered_kv_records=[["a"]]),
        dict(key="a", ordered_kv_records=[["a", 3]]),
        dict(key=["a"], ordered_kv_records=[["a", "b"]]),
        dict(key=None, ordered_kv_records=[]),
    ],
    ids=str,
)
def test_damaged_retrieval_records_are_named(tmp_path, row):
    (tmp_path / "text/kv_retrieval").mkdir(parents=True)
    path = tmp_path / "text/kv_retrieval/a.jsonl.gz"
    good = json.dumps(dict(key="a", ordered_kv_records=[["a", "b"]]))
    path.write_bytes(gzip.compress(f"{good}\n{json.dumps(row)}\n".encode()))
    with pytest.raises(CorpusError, match="line 2: expected ordered_kv_records"):
        corpora.kv_retrieval(tmp_path, 1)
    path.write_bytes(gzip.compress(good.encode()))
    assert corpora.kv_retrieval(tmp_path, 1)[0] == dict(pairs=[("a", "b")], key="a", value="b")


def test_the_hub_is_asked_for_fixed_revisions():
    assert all(len(revision) == 40 for _, _, revision in corpora.HUB.values())
