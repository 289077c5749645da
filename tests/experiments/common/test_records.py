"""Lines of JSON that are no decoded turns; those are tested beside the report that reads them."""

import json

import numpy as np
import pytest

from experiments.common import records
from experiments.common.cli import UserError
from experiments.common.records import RecordError


def test_lines_with_other_fields_come_back(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    assert records.read(path, fields=("kind",)) == []
    found = [{"kind": "a", "us": 1.5}, {"kind": "b", "sizes": [1, 2]}]
    for record in found:
        records.append(path, record)
    assert records.read(path, fields=("kind",)) == found
    assert [json.loads(line) for line in path.read_text().splitlines()] == found


def test_a_line_without_the_fields_is_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"kind": "a", "us": 1}\n{"kind": "b"}\n')
    with pytest.raises(RecordError, match=r"line 2: not a record .* with kind, us\. Delete"):
        records.read(path, fields=("kind", "us"))
    assert issubclass(RecordError, UserError)


def test_a_half_written_line_is_dropped_and_replaced(tmp_path, caplog):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"kind": "a"}\n{"kind": "b", "us')
    assert records.read(path, fields=("kind",)) == [{"kind": "a"}]
    assert "half-written last line (line 2)" in caplog.text
    records.append(path, {"kind": "c"})
    assert path.read_text() == '{"kind": "a"}\n{"kind": "c"}\n'


def test_a_whole_last_line_without_a_newline_is_kept(tmp_path):
    """Whatever its fields are."""
    path = tmp_path / "lines.jsonl"
    path.write_text('{"kind": "a"}')
    records.append(path, {"kind": "b"})
    assert path.read_text() == '{"kind": "a"}\n{"kind": "b"}\n'


def test_what_json_cannot_hold_leaves_the_file_alone(tmp_path):
    path = tmp_path / "lines.jsonl"
    records.append(path, {"kind": "a", "nan": np.float32("nan"), "row": np.arange(2), "at": path})
    before = path.read_text()
    assert json.loads(before) == {"kind": "a", "nan": None, "row": [0, 1], "at": str(path)}
    with pytest.raises(TypeError, match="cannot hold a set"):
        records.append(path, {"kind": {1, 2}})
    assert path.read_text() == before
    with pytest.raises(TypeError, match="cannot hold a set"):
        records.write_json(tmp_path / "whole.json", {"kind": {1, 2}})
    assert [p.name for p in tmp_path.iterdir()] == ["lines.jsonl"]


def test_the_environment_names_versions_and_the_commit():
    found = records.environment()
    assert set(found["packages"]) == {"jax", "jaxlib", "numpy"} and all(found["packages"].values())
    assert found["cpu_count"] >= 1
    assert {"time", "python", "platform", "commit", "modified"} <= set(found)
