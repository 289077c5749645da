"""Text by name, from files, and what is said where there is none."""

import gzip

import numpy as np
import pytest

from experiments.palu import corpora
from experiments.palu.corpora import CorpusError


def test_the_documentation_of_python_needs_nothing():
    parts = {part: corpora.text("python", part) for part in ("calibration", "evaluation")}
    assert len(parts["calibration"]) > 100_000 and len(parts["evaluation"]) > 20_000
    words = {part: " ".join(text.split()) for part, text in parts.items()}
    long = [p for p in parts["evaluation"].split("\n\n") if len(p) > 300]
    assert len(long) > 20
    for paragraph in long:
        assert " ".join(paragraph.split()) not in words["calibration"]
    assert corpora.text("python", "evaluation") == parts["evaluation"]


def test_a_file_is_split(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789")
    one, two = (corpora.text(str(tmp_path / "a.txt"), p) for p in ("calibration", "evaluation"))
    assert (one, two) == ("01234567", "89")


def test_folders(tmp_path):
    for name, content in {
        "wikitext2/wiki.test.raw.gz": gzip.compress(b" = A = \n"),
        "c4/c4_en_sample.jsonl": b'{"text": "one"}\n{"prompt": "tw", "response": "o"}\n',
        "gutenberg/war_and_peace_pg2600.txt.gz": gzip.compress(
            b"head\r\n*** START OF X\r\n" + b"body\r\n" * 10 + b"*** END OF X\r\ntail"
        ),
    }.items():
        path = tmp_path / "text" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    assert corpora.text("wikitext2", "evaluation", tmp_path) == " = A = \n"
    assert corpora.text("c4", "evaluation", tmp_path) == "one two"
    book = corpora.text("book", "calibration", tmp_path) + corpora.text(
        "book", "evaluation", tmp_path
    )
    assert book.split() == ["body"] * 10
    (tmp_path / "text/c4/c4_en_sample.jsonl").write_text('{"text": "one"}\n[]\n')
    with pytest.raises(CorpusError, match="line 2"):
        corpora.text("c4", "evaluation", tmp_path)
    (tmp_path / "text/wikitext2/wiki.test.raw.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(CorpusError, match="cannot be read"):
        corpora.text("wikitext2", "evaluation", tmp_path)


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(CorpusError, match="neither a corpus"):
        corpora.text("wikitext3", "evaluation")
    with pytest.raises(CorpusError, match="no network"):
        corpora.text("wikitext2", "evaluation", tmp_path)
    with pytest.raises(CorpusError, match="--data-dir"):
        corpora.text("book", "evaluation")
    with pytest.raises(CorpusError, match="does not exist"):
        corpora.text("c4", "evaluation", tmp_path / "no")


def test_wikitext_is_the_canonical_file(shared_data):
    text = corpora.text("wikitext2", "evaluation", shared_data)
    assert len(text.encode()) == 1_290_590


def test_windows():
    tokens = np.arange(10)
    np.testing.assert_array_equal(corpora.windows(tokens, 4, 5), [[0, 1, 2, 3], [4, 5, 6, 7]])
    assert corpora.windows(tokens, 3, 0).shape == (3, 3)
    drawn = corpora.windows(tokens, 4, 6, seed=1)
    assert drawn.shape == (6, 4) and (np.diff(drawn) == 1).all() and drawn.dtype == np.int32
    with pytest.raises(CorpusError, match="10 tokens; 11"):
        corpora.windows(tokens, 11, 1)


def test_retrieval_records(shared_data):
    for folder in (None, shared_data):
        records = corpora.kv_retrieval(folder, 3, pairs=5)
        assert len(records) == 3
        for r in records:
            assert len(r["pairs"]) == 5 and dict(r["pairs"])[r["key"]] == r["value"]
    assert corpora.kv_retrieval(None, 2, 4) == corpora.kv_retrieval(None, 2, 4)
