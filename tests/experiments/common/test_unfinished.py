"""What interrupted work leaves, who gets it back, and that nothing is left at the end."""

import json

import numpy as np
import pytest

from experiments.common import records
from experiments.common.records import RecordError
from experiments.common.unfinished import Unfinished
from llm_jax.files import LockedError

IDENTITY = {"network": "abc", "size": (64, 96)}


def interrupted(output, *results):
    """Work that finds these and is interrupted then."""
    with pytest.raises(KeyboardInterrupt), Unfinished(output, IDENTITY) as work:
        for what, value in results:
            work.add(what, value)
        raise KeyboardInterrupt


def test_what_was_found_comes_back_until_the_work_ends(tmp_path):
    output = tmp_path / "scores.jsonl"
    found = {"iou": [0.1, float("nan")], "boxes": np.float32([0.1, 2])}
    interrupted(output, ("part", found), ("part", 2), ("other", [3]))
    assert [p.name for p in tmp_path.iterdir()] == ["scores.jsonl.unfinished"]
    assert Unfinished(output, dict(IDENTITY, size=[64, 96])).is_begun()  # as JSON has it
    with Unfinished(output, IDENTITY) as work:
        first, second = work.found("part")
        assert first["iou"] == [0.1, None] and second == 2 and work.found("none") == []
        np.testing.assert_array_equal(np.float32(first["boxes"]), found["boxes"])
        assert work.found("other") == [[3]]
    assert not list(tmp_path.iterdir()) and not Unfinished(output, IDENTITY).is_begun()


def test_other_work_begins_anew(tmp_path):
    interrupted(tmp_path / "scores.jsonl", ("part", 1))
    for output, identity in (("scores.jsonl", "another"), ("more.jsonl", IDENTITY)):
        with pytest.raises(KeyboardInterrupt), Unfinished(tmp_path / output, identity) as work:
            assert work.found("part") == []
            raise KeyboardInterrupt
    with Unfinished(tmp_path / "scores.jsonl", IDENTITY) as work:  # which is still there
        assert work.found("part") == [1]


def test_work_that_ends_leaves_other_work_alone(tmp_path):
    """As a loop over networks with one output does, in which the second was interrupted."""
    output = tmp_path / "scores.jsonl"
    interrupted(output, ("part", 1), ("part", {"found": [0.1, None]}))
    with Unfinished(output, "another") as work:
        work.add("part", 7)
    assert Unfinished(output, IDENTITY).is_begun() and not Unfinished(output, "another").is_begun()
    with Unfinished(output, IDENTITY) as work:
        assert work.found("part") == [1, {"found": [0.1, None]}]
    assert not list(tmp_path.iterdir())


def test_work_that_found_nothing_and_work_without_an_output_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    interrupted(tmp_path / "scores.jsonl")
    interrupted(None, ("part", 1))
    assert not list(tmp_path.iterdir()) and not Unfinished(None, IDENTITY).is_begun()


def test_a_record_is_published_once(tmp_path):
    output, row = tmp_path / "scores.jsonl", {"score": 0.5, "time": "first"}
    records.append(output, {"score": 0.1})
    interrupted(output, ("row", row))  # before it was written to the output
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), Unfinished(output, IDENTITY) as work:
            assert work.publish(output, "row", {"score": 0.5, "time": "later"}) == row
            raise KeyboardInterrupt
        assert records.read(output, ()) == [{"score": 0.1}, row]
    with Unfinished(output, IDENTITY) as work:
        assert work.publish(output, "row", row) == row
    with Unfinished(output, IDENTITY) as work:  # the same again, later, is another measurement
        assert work.publish(output, "row", row) == row
    assert records.read(output, ()) == [{"score": 0.1}, row, row]


def test_two_at_a_time_are_refused(tmp_path):
    with Unfinished(tmp_path / "a", IDENTITY):
        with pytest.raises(LockedError, match="another process writes"):
            Unfinished(tmp_path / "a", IDENTITY).__enter__()
        with Unfinished(tmp_path / "b", IDENTITY):
            pass


@pytest.mark.parametrize("change", [dict(value=3), dict(what="row"), dict(work="x"), dict(what=4)])
def test_a_result_that_was_changed_is_named(tmp_path, change):
    interrupted(tmp_path / "a", ("part", 1), ("part", 2))
    path = tmp_path / "a.unfinished/records.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(json.dumps(json.loads(first) | change) + f"\n{second}\n")
    with pytest.raises(RecordError, match=r"line 1: its checksum is not .* Delete the line"):
        Unfinished(tmp_path / "a", IDENTITY).__enter__()
