import collections
import gzip
import json
import random
import sys
import types
import zipfile
from typing import get_args

import pytest

from experiments.speculative.benchmarks import (
    BENCHMARKS,
    SPECS,
    BenchmarkError,
    BenchmarkName,
    Conversation,
)
from experiments.speculative.benchmarks import load_conversations as load
from llm_jax.tokenizer import ByteTokenizer

CATEGORIES = {
    "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities",
}  # fmt: skip

PROBLEMS = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(9)]


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(r) + "\n" for r in records).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Neither hub nor TensorFlow Datasets, whatever is installed."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)


def message(name="gsm8k", *args, **options) -> str:
    with pytest.raises(BenchmarkError) as caught:
        load(name, *args, **options)
    return str(caught.value)


# --- builtin -----------------------------------------------------------------------------------


def test_builtin_prompts_cover_the_categories_evenly():
    samples = load("builtin")
    assert len(samples) >= 30
    assert set(collections.Counter(s.category for s in samples).items()) == {
        (category, 4) for category in CATEGORIES
    }
    assert {s.category for s in samples[:8]} == CATEGORIES
    assert sum(len(s.turns) == 2 for s in samples) >= 8


def test_builtin_prompts_are_unique_and_tidy():
    samples = load("builtin")
    turns = [turn for s in samples for turn in s.turns]
    assert len({s.id for s in samples}) == len(samples)
    assert len(set(turns)) == len(turns)
    assert all(turn == turn.strip() and 30 < len(turn) < 700 for turn in turns)


def test_builtin_keeps_file_order_whatever_the_seed():
    assert load("builtin", samples=5, seed=3) == load("builtin")[:5]
    assert len(load("builtin", samples=10_000)) == len(load("builtin"))


# --- texts -------------------------------------------------------------------------------------


def test_texts_are_continued_as_they_stand():
    samples = load("texts")
    assert len({s.id for s in samples}) == len({s.turns for s in samples}) == len(samples) >= 8
    assert all(s.plain and len(s.turns) == 1 and 100 < len(s.turns[0]) < 700 for s in samples)
    tokenizer = ByteTokenizer()
    assert bytes(samples[0].prompt(tokenizer)).decode() == samples[0].turns[0]


def test_a_conversation_has_the_answers_between_its_turns():
    sample = Conversation("a", "b", ("one", "two", "three"))
    said = lambda *answers: bytes(sample.prompt(ByteTokenizer(), answers)).decode()
    assert said() == "user: one\nassistant:"
    assert said("1") == "user: one\nassistant: 1\nuser: two\nassistant:"
    assert said("1", "2").endswith("user: two\nassistant: 2\nuser: three\nassistant:")


# --- Selection ---------------------------------------------------------------------------------


def test_shuffle_is_that_of_the_seed_and_prefixes_agree(tmp_path):
    write(tmp_path / "gsm8k.jsonl", PROBLEMS)
    order = list(range(len(PROBLEMS)))
    random.Random(0).shuffle(order)
    samples = load("gsm8k", tmp_path)
    assert [s.id for s in samples] == [str(i) for i in order]
    assert all(f"What is {s.id} + 1?" in s.turns[0] for s in samples)
    assert load("gsm8k", tmp_path, 4) == samples[:4]
    assert load("gsm8k", tmp_path, 50) == samples  # fewer than asked for: the caller sees len
    assert load("gsm8k", tmp_path, seed=1) != samples


@pytest.mark.parametrize(
    "place",
    ["text/gsm8k/test.jsonl.gz", "text/gsm8k/test.jsonl", "gsm8k/test.jsonl", "gsm8k.jsonl.gz"],
)
def test_layouts_of_the_data_directory(tmp_path, place):
    write(tmp_path / place, PROBLEMS)
    assert len(load("gsm8k", tmp_path)) == len(PROBLEMS)


def test_data_directory_may_be_the_benchmarks_own_folder(tmp_path):
    write(tmp_path / "gsm8k" / "test.jsonl", PROBLEMS)
    assert len(load("gsm8k", tmp_path / "gsm8k")) == len(PROBLEMS)


def test_a_file_of_another_benchmark_with_the_same_name_is_not_taken(tmp_path):
    write(tmp_path / "math500" / "test.jsonl", [{"problem": "p", "unique_id": "u"}])
    assert "no data for benchmark 'gsm8k'" in message("gsm8k", tmp_path)
    assert load("math-500", tmp_path)[0].id == "u"


# --- Records -> turns --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, record, id, category, holds",
    [
        (
            "mt-bench",
            {"question_id": 81, "category": "writing", "turns": ["one", "two"]},
            "81",
            "writing",
            ["one", "two"],
        ),
        ("mt-bench", {"prompt": ["one"], "category": "stem"}, "0", "stem", ["one"]),
        ("spec-bench", {"question_id": 0, "category": "qa", "turns": ["q"]}, "0", "qa", ["q"]),
        ("alpaca", {"instruction": "Do.", "input": "x"}, "0", "alpaca", ["Do.\n\nx"]),
        ("alpaca", {"instruction": "Do.", "input": ""}, "0", "alpaca", ["Do."]),
        ("humaneval", {"task_id": "H/1", "prompt": "def f():"}, "H/1", "humaneval", ["def f():"]),
        ("cnn-dm", {"id": "ab", "article": "News."}, "ab", "cnn-dm", ["News."]),
        ("aime", {"id": 60, "problem": "Find m+n."}, "60", "aime", ["Find m+n."]),
        (
            "math-500",
            {"unique_id": "t/1", "subject": "Algebra", "problem": "x=?"},
            "t/1",
            "Algebra",
            ["x=?"],
        ),
        (
            "livecodebench",
            {
                "question_id": "a",
                "difficulty": "easy",
                "question_content": "Sort.",
                "starter_code": "",
            },
            "a",
            "easy",
            ["standard input"],
        ),
        (
            "livecodebench",
            {"question_id": "a", "question_content": "Sort.", "starter_code": "class S:"},
            "a",
            "livecodebench",
            ["class S:"],
        ),
        (
            "longbench-qasper",
            {"_id": "z", "context": "Paper.", "input": "Why?"},
            "z",
            "longbench-qasper",
            ["Paper.\n\nWhy?"],
        ),
        (
            "longbench-lcc",
            {"_id": "z", "context": "x = 1", "input": ""},
            "z",
            "longbench-lcc",
            ["x = 1"],
        ),
    ],
)
def test_records_become_turns(tmp_path, name, record, id, category, holds):
    write(tmp_path / f"{name}.jsonl", [record])
    (sample,) = load(name, tmp_path)
    assert (sample.id, sample.category) == (id, category)
    assert len(sample.turns) == len(holds)
    assert all(part in turn for part, turn in zip(holds, sample.turns))


def test_gpqa_choices_are_all_there_in_a_fixed_order(tmp_path):
    record = {"Question": "Which?", "Record ID": "r", "Correct Answer": "right"}
    record |= {f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}
    records = [record | {"Question": f"Which {i}?", "Record ID": f"r{i}"} for i in range(40)]
    write(tmp_path / "gpqa.jsonl", records)
    samples = load("gpqa", tmp_path)
    assert samples == load("gpqa", tmp_path)
    letters = set()
    for sample in samples:
        lines = [line for line in sample.turns[0].splitlines() if line[1:3] == ") "]
        assert [line[0] for line in lines] == list("ABCD")
        assert {line[3:] for line in lines} == {"right", "wrong 1", "wrong 2", "wrong 3"}
        letters |= {line[0] for line in lines if line.endswith("right")}
    assert letters == set("ABCD")  # the right answer is not always at the same place


def test_csv_and_zip_files(tmp_path):
    fields = ["Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    (tmp_path / "gpqa").mkdir()
    text = ",".join(fields) + '\n"Two\nlines, one comma",a,b,c,d\n'
    (tmp_path / "gpqa" / "gpqa_diamond.csv").write_text(text)
    assert "Two\nlines, one comma" in load("gpqa", tmp_path)[0].turns[0]

    (tmp_path / "longbench").mkdir()
    with zipfile.ZipFile(tmp_path / "longbench" / "data.zip", "w") as archive:
        archive.writestr("data/hotpotqa_e.jsonl", '{"_id": "no", "context": "no"}\n')
        archive.writestr("data/hotpotqa.jsonl", '{"_id": "yes", "context": "c", "input": "i"}\n')
    assert load("longbench-hotpotqa", tmp_path)[0].id == "yes"


def test_parquet_files(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet

    (tmp_path / "gsm8k").mkdir()
    table = pa.table({"question": ["a?", "b?", "c?"]})
    pyarrow.parquet.write_table(table, tmp_path / "gsm8k" / "test.parquet")
    assert sorted(s.turns[0][-2:] for s in load("gsm8k", tmp_path)) == ["a?", "b?", "c?"]


def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "gsm8k.parquet").write_bytes(b"PAR1")
    assert "reading gsm8k.parquet needs pyarrow, which is not installed: pip install" in message(
        "gsm8k", tmp_path
    )


# --- Other sources -----------------------------------------------------------------------------


def test_hub_files_are_read(tmp_path, monkeypatch):
    write(tmp_path / "raw" / "question.jsonl", [{"prompt": ["a", "b"], "category": "stem"}])
    asked = []

    def snapshot_download(repo, *, repo_type, allow_patterns):
        asked.append((repo, repo_type, allow_patterns))
        return str(tmp_path)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert load("mt-bench") == [Conversation("0", "stem", ("a", "b"))]
    assert asked == [("HuggingFaceH4/mt_bench_prompts", "dataset", "raw/question.jsonl")]


def test_tfds_records_are_decoded_and_marked(monkeypatch):
    asked = []

    def data_source(name, *, split, builder_kwargs):
        asked.append((name, split, builder_kwargs))
        return [{"question": b"One caf\xc3\xa9?", "answer": b"#### 1"}]

    tfds = types.SimpleNamespace(data_source=data_source)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", tfds)
    monkeypatch.setitem(sys.modules, "array_record", types.ModuleType("array_record"))
    (sample,) = load("gsm8k")
    assert sample.id == "tfds-0" and sample.turns[0].endswith("One café?")
    assert asked == [("gsm8k", "test", {"file_format": "array_record"})]


def test_one_message_lists_all_that_was_tried(tmp_path):
    text = message("gsm8k", tmp_path)
    for part in (
        "gsm8k/test.jsonl[.gz]",
        "fetching openai/gsm8k needs huggingface_hub, which is not installed",
        "TensorFlow Datasets needs tensorflow_datasets, which is not installed",
        "pip install 'thimble-jax[eval]'",
        "question",
        f"--data-dir {tmp_path}",
        "--benchmark builtin",
    ):
        assert part in text


def test_a_package_that_cannot_be_imported_is_one_of_the_reasons(tmp_path, monkeypatch):
    """Such as TensorFlow Datasets without a package that it needs and does not declare."""
    (tmp_path / "tensorflow_datasets.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorflow_datasets")
    monkeypatch.setitem(sys.modules, "array_record", types.ModuleType("array_record"))
    assert "tfds   No module named 'no_such_package'" in message("gsm8k", tmp_path)


def test_gated_data_says_so(monkeypatch):
    def snapshot_download(*args, **options):
        raise PermissionError("401 Client Error\nmore lines")

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    text = message("gpqa")
    assert "401 Client Error" in text and "more lines" not in text
    assert "gated" in text and "hf auth login" in text
    assert "gated" not in message("gsm8k")


# --- Errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, line, part",
    [
        (b'{"question": "a?"}\n{"question": "b', 2, "not JSON"),
        (b'{"question": "a?"}\n\n[1]\n', 3, "JSON object"),
        (b'{"question": "a?"}\n{"answer": "b"}\n', 2, "'question' is missing"),
        (b'{"question": "a?"}\n{"question": 7}\n', 2, "'question' is '7'"),
        (b'{"question": " "}\n', 1, "non-empty"),
        (b'{"question": "\xff"}\n', 1, "not JSON"),
    ],
)
def test_bad_records_are_named_by_file_and_line(tmp_path, content, line, part):
    path = tmp_path / "gsm8k.jsonl"
    path.write_bytes(content)
    text = message("gsm8k", tmp_path)
    assert f"{path}, line {line}:" in text and part in text


@pytest.mark.parametrize("turns", [[], "text", [1], ["ok", ""], None])
def test_bad_turns(tmp_path, turns):
    write(tmp_path / "mt-bench.jsonl", [{"question_id": 1, "category": "c", "turns": turns}])
    text = message("mt-bench", tmp_path)
    assert "line 1" in text and "'turns" in text


def test_a_repeated_id_names_both_lines(tmp_path):
    write(tmp_path / "cnn-dm.jsonl", [{"id": "a", "article": "x"}, {"id": "a", "article": "y"}])
    text = message("cnn-dm", tmp_path)
    assert "line 2" in text and "line 1" in text and "'a'" in text


@pytest.mark.parametrize("cut", [5, 30])
def test_a_cut_gzip_file(tmp_path, cut):
    path = tmp_path / "gsm8k.jsonl.gz"
    write(path, PROBLEMS)
    path.write_bytes(path.read_bytes()[:cut])
    text = message("gsm8k", tmp_path)
    assert str(path) in text and "damaged" in text


def test_an_empty_file_is_not_an_empty_benchmark(tmp_path):
    (tmp_path / "gsm8k.jsonl").write_text("\n")
    assert "no records" in message("gsm8k", tmp_path)


def test_wrong_arguments(tmp_path):
    assert "Did you mean 'gsm8k'" in message("gsm8")
    assert "builtin, texts, mt-bench" in message("nothing like it")
    assert "samples = 0" in message("builtin", samples=0)
    assert "not a directory" in message("gsm8k", tmp_path / "absent")


def test_names():
    assert get_args(BenchmarkName) == BENCHMARKS == ("builtin", "texts", *SPECS)
    assert len(set(BENCHMARKS)) == len(BENCHMARKS) == 2 + 10 + 16  # LongBench has 16


# --- The real files ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, count, two_turns",
    [
        ("mt-bench", 80, 80),
        ("spec-bench", 480, 80),
        ("gsm8k", 1319, 0),
        ("humaneval", 164, 0),
        ("cnn-dm", 200, 0),
        ("math-500", 500, 0),
    ],
)
def test_real_files(shared_data, name, count, two_turns):
    samples = load(name, shared_data)
    assert len(samples) == count
    assert sum(len(s.turns) == 2 for s in samples) == two_turns
    assert len({s.id for s in samples}) == count
