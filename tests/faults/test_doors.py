"""Every malformed file is named, or rightly accepted: no traceback, no hang, nothing silent.

`python tests/faults/test_doors.py [CASES]` prints the table of docs/reliability.md.
"""

import collections
import sys
import tempfile
from pathlib import Path

import pytest
from doors import DOORS, MUTATIONS

CASES = 60
"""Of each door."""


def outcomes(name: str, folder: Path, seeds) -> collections.Counter:
    door, found = DOORS[name], collections.Counter()
    folder.mkdir(parents=True, exist_ok=True)
    file = door.make(folder)
    whole, valid = file.read_bytes(), door.read(file)
    assert door.outcome(file, whole, valid) == "accepted"
    for seed in seeds:
        damaged = MUTATIONS[door.kind](whole, seed)
        try:
            found[door.outcome(file, damaged, valid)] += 1
        except BaseException as error:
            raise AssertionError(f"{name}, seed {seed}: {error!r}") from error
    return found


@pytest.mark.parametrize("name", DOORS)
def test_a_malformed_file_is_named_or_rightly_accepted(tmp_path, name):
    found = outcomes(name, tmp_path / "door", range(CASES))
    assert not found["silent"] and sum(found.values()) == CASES


if __name__ == "__main__":
    print("| door | named | accepted | silent |\n|---|---|---|---|")
    cases = int(sys.argv[1]) if sys.argv[1:] else CASES
    for door in DOORS:
        with tempfile.TemporaryDirectory() as scratch:
            row = outcomes(door, Path(scratch) / "door", range(cases))
        print(f"| {door} | {row['named']} | {row['accepted']} | {row['silent']} |", flush=True)
