"""Every malformed file is named, or rightly accepted: no traceback, no hang, nothing silent.

`python tests/faults/test_doors.py [CASES]` prints the table of docs/reliability.md.
"""

import collections
import os
import socket
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


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


PLACES = {
    "nothing": lambda path: None,
    "folder": Path.mkdir,
    "named pipe": os.mkfifo,
    "socket": socket_at,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path),
}
OPTIONAL = ("index", "generation_config", "tokenizer_config", "template", "records", "labels")
OPTIONAL += ("Palu statistics", "unfinished work")
"""What may be missing. A link to itself is missing, too."""


@pytest.mark.parametrize("name", DOORS)
def test_what_is_no_file_is_named(tmp_path, monkeypatch, name):
    """Nothing waits for a pipe, or reads a device without an end."""
    door = DOORS[name]
    (tmp_path / "door").mkdir()
    file = door.make(tmp_path / "door")
    monkeypatch.chdir(file.parent)  # the name of a socket must be short
    file.unlink()
    for what, place in PLACES.items():
        place(file)
        if what not in ("nothing", "link to itself") or name not in OPTIONAL:
            assert door.read_outcome(file) == "named", what
        if file.is_dir():
            file.rmdir()
        else:
            file.unlink(missing_ok=True)


if __name__ == "__main__":
    print("| door | named | accepted | silent |\n|---|---|---|---|")
    cases = int(sys.argv[1]) if sys.argv[1:] else CASES
    for door in DOORS:
        with tempfile.TemporaryDirectory() as scratch:
            row = outcomes(door, Path(scratch) / "door", range(cases))
        print(f"| {door} | {row['named']} | {row['accepted']} | {row['silent']} |", flush=True)
