"""Every malformed file is named, or rightly accepted: no traceback, no hang, nothing silent.

    pytest -m "slow or not slow" tests/faults/test_doors.py

`python tests/faults/test_doors.py` prints the table of doors and outcomes in docs/reliability.md.
"""

import collections
import sys
import tempfile
from pathlib import Path

import pytest
from doors import DOORS, MUTATIONS

CASES, PART = 60, 6
"""Cases a door, and of one test; the first part of each door is quick."""


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


@pytest.mark.quick_cases(*(f"0-{name}" for name in DOORS))
@pytest.mark.parametrize("name", DOORS)
@pytest.mark.parametrize("part", range(CASES // PART))
def test_a_malformed_file_is_named_or_rightly_accepted(tmp_path, name, part):
    found = outcomes(name, tmp_path / "door", range(part * PART, (part + 1) * PART))
    assert not found["silent"] and sum(found.values()) == PART


if __name__ == "__main__":
    print("| door | named | accepted | silent |\n|---|---|---|---|")
    for door in sys.argv[1:] or DOORS:
        with tempfile.TemporaryDirectory() as scratch:
            row = outcomes(door, Path(scratch) / "door", range(CASES))
        print(f"| {door} | {row['named']} | {row['accepted']} | {row['silent']} |", flush=True)
