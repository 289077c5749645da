"""Files and folders that appear whole or not at all."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llm_jax.files import LockedError, atomic_file, atomic_folder, check_writable, locked

ROOT = Path(__file__).parents[2]


def names(folder):
    """Everything below a folder, scratch files and folders too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def killed_inside(statement: str) -> None:
    """Runs `with <statement> as scratch` in a process that kills itself inside the block."""
    program = f"""
import os, signal
from llm_jax.files import LockedError, atomic_file, atomic_folder, check_writable, locked
with {statement} as scratch:
    target = scratch / "part" if scratch.is_dir() else scratch
    target.write_text("half of the new te")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == -signal.SIGKILL, found.stderr


# --- Files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [None, "old"])
def test_a_file_has_its_content_when_the_block_ends(tmp_path, old):
    path = tmp_path / "new" / "folder" / "a.txt"
    if old is not None:
        path.parent.mkdir(parents=True)
        path.write_text(old)
    with atomic_file(path) as scratch:
        scratch.write_text("new")
        assert scratch.name == path.name  # writers that look at the suffix see the right one
        assert (path.read_text() if path.exists() else None) == old
    assert path.read_text() == "new"
    assert names(tmp_path) == ["new", "new/folder", "new/folder/a.txt"]


def test_a_path_may_be_a_string(tmp_path):
    with atomic_file(str(tmp_path / "a.txt")) as scratch:
        scratch.write_bytes(b"new")
    with atomic_folder(str(tmp_path / "b")) as scratch:
        (scratch / "c").write_bytes(b"new")
    assert names(tmp_path) == ["a.txt", "b", "b/c"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_file(path) as scratch:
        scratch.write_text("ne")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "a.txt"):
        pass
    assert names(tmp_path) == []


def test_a_killed_process_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    killed_inside(f"atomic_file({str(path)!r})")
    assert path.read_text() == "old"
    assert len(names(tmp_path)) == 3  # a folder, with half a file
    with atomic_file(path) as scratch:
        scratch.write_text("new")
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    other = tmp_path / f".a.txt.{os.getppid()}.x1"
    other.mkdir()
    with atomic_file(tmp_path / "a.txt") as scratch:
        scratch.write_text("new")
    assert names(tmp_path) == [other.name, "a.txt"]


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    path, done = tmp_path / "a.txt", []
    flush, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append("flush") or flush(file))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("replace") or replace(*paths))
    with atomic_file(path) as scratch:
        scratch.write_text("new")
    assert done == ["flush", "replace", "flush"]  # the last one is the name's


# --- Folders -----------------------------------------------------------------------------------


def test_a_folder_has_its_content_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "model"
    with atomic_folder(path) as scratch:
        (scratch / "inner").mkdir()
        (scratch / "inner" / "a.txt").write_text("a")
        (scratch / "b.txt").write_text("b")
        assert not path.exists()
    assert names(path) == ["b.txt", "inner", "inner/a.txt"]
    assert (path / "inner" / "a.txt").read_text() == "a"
    assert [p.name for p in path.parent.iterdir()] == ["model"]


def test_a_folder_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").mkdir()
    with atomic_folder(tmp_path / "model"):
        pass
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_exists_is_never_replaced(tmp_path, kind):
    path = tmp_path / "model"
    path.mkdir() if kind == "folder" else path.write_text("old")
    with pytest.raises(FileExistsError, match="model exists"), atomic_folder(path):
        raise AssertionError("the block ran")
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_there_is_no_folder(tmp_path, error):
    with pytest.raises(error), atomic_folder(tmp_path / "model") as scratch:
        (scratch / "a.txt").write_text("a")
        raise error
    assert names(tmp_path) == []


def test_a_killed_process_leaves_no_folder_of_that_name(tmp_path):
    path = tmp_path / "model"
    killed_inside(f"atomic_folder({str(path)!r})")
    assert not path.exists()
    with atomic_folder(path) as scratch:
        (scratch / "a.txt").write_text("a")
    assert names(path) == ["a.txt"]


def test_every_file_of_a_folder_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    done, flush, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append("flush") or flush(file))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("replace") or replace(*paths))
    with atomic_folder(tmp_path / "model") as scratch:
        (scratch / "inner").mkdir()
        (scratch / "inner" / "a.txt").write_text("a")
        (scratch / "b.txt").write_text("b")
    # Two files and two folders; then the name.
    assert done == ["flush"] * 4 + ["replace", "flush"]


# Locks, and looking before long work.


def test_a_folder_is_kept_by_one_block_at_a_time(tmp_path):
    folder = tmp_path / "new" / "out"
    with locked(folder):
        message = f"another process writes to {folder}; wait until it ends"
        with pytest.raises(LockedError, match=message), locked(str(folder)):
            pass
        with locked(tmp_path / "new"):  # another folder
            pass
    with locked(folder):
        pass
    assert list(folder.iterdir()) == []  # nothing is left that could be stale


def test_a_killed_process_lets_a_folder_go(tmp_path):
    code = (
        "import sys, time; from llm_jax.files import locked\n"
        f"with locked({str(tmp_path)!r}):\n    print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(LockedError), locked(tmp_path):
            pass
        other.kill()
    with locked(tmp_path):
        pass


def test_whether_a_folder_can_be_written_is_known_before(tmp_path, monkeypatch):
    check_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileExistsError):
        check_writable(tmp_path / "file")

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        check_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
