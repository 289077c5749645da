"""What is committed as measured: JSON lines that name no folder of the machine they came from."""

import json
import pathlib
import re

import pytest

RESULTS = pathlib.Path(__file__).parents[2] / "experiments/results"
ABSOLUTE = re.compile(r'"(/|~|[A-Za-z]:\\\\)[^"]*"')


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda p: p.stem)
def test_every_line_is_json_without_paths_of_a_machine(path):
    lines = path.read_text().splitlines()
    assert lines and all(isinstance(json.loads(line), dict) for line in lines)
    assert not [match[0] for line in lines if (match := ABSOLUTE.search(line))]
