"""What a run of training leaves on disk, so that a killed run continues: states and a log."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax.files import atomic_file
from qyolop_jax.arrays import read_arrays, write_arrays
from qyolop_jax.stages import TrainError


class TrainingLog:
    """A file of JSON lines. `rewind` drops the lines that are newer than a checkpoint."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, **record: Any) -> None:
        """Appends one line."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def rewind(self, stage: int, step: int) -> None:
        """Keeps the whole lines up to this step of this stage.

        TrainError for a line that is no record, unless it is the last one, which a kill cut off.
        """
        if not self.path.exists():
            return
        lines = []
        *whole, last = self.path.read_bytes().split(b"\n")
        for number, line in enumerate([*whole, last] if last else whole, 1):
            try:
                r = json.loads(line)
                newer = (r["stage"], r["step"]) > (stage, step)
            except (ValueError, TypeError, KeyError) as error:
                if line is last:
                    continue
                raise TrainError(
                    f"{self.path}, line {number}: not a record ({line[:40]!r}); delete the line"
                ) from error
            if not newer:
                lines.append(line.decode() + "\n")
        with atomic_file(self.path) as scratch:
            scratch.write_text("".join(lines))


class Checkpoints:
    """Training states on disk: whole ones only, the two newest, each a file of `arrays`.

    What is damaged, and what cannot be written, is a TrainError.
    """

    KEEP, KEY = 2, "training"

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def newest(self) -> dict[str, Any] | None:
        """The description that was saved with the newest state; None where there is none."""
        if others := [f for f in self.folder.glob("*") if f.name.isdecimal()]:
            raise TrainError(f"{others[0]} is a state of another version; take another folder")
        return self._read()[0] if self._numbers() else None

    def restore(self, like: Any) -> Any:
        """The newest state, with the shapes, types and devices of `like`."""
        _, found, file = self._read()
        leaves, tree = jax.tree_util.tree_flatten_with_path(like)
        want = {jax.tree_util.keystr(path): a for path, a in leaves}
        kind = lambda a: (a.shape, a.dtype)
        fits = lambda n: n in found and n in want and kind(found[n]) == kind(want[n])
        if wrong := sorted(n for n in want.keys() | found.keys() if not fits(n)):
            raise TrainError(
                f"{file}: {len(wrong)} arrays are not those of this network, such as {wrong[0]}; "
                "take another folder"
            )
        return tree.unflatten(jax.device_put(found[n], a.sharding) for n, a in want.items())

    def save(self, at: int, state: Any, about: dict[str, Any]) -> None:
        """Writes a state under the number `at`; returns when the disk has it."""
        leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
        flat = {jax.tree_util.keystr(path): a for path, a in leaves}
        file = self._file(at)
        try:
            write_arrays(file, flat, {self.KEY: json.dumps(about)})
            for old in self._numbers()[: -self.KEEP]:
                self._file(old).unlink()
        except OSError as error:
            raise TrainError(
                f"{file} cannot be written ({error}); make room, and the same command resumes"
            ) from error

    def _file(self, at: int) -> Path:
        return self.folder / f"{at}.safetensors"

    def _numbers(self) -> list[int]:
        """The numbers of all states, sorted."""
        stems = [f.stem for f in self.folder.glob("*.safetensors")]
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    def _read(self) -> tuple[dict[str, Any], dict[str, np.ndarray], Path]:
        """(description, arrays, file) of the newest state."""
        file = self._file(self._numbers()[-1])
        try:
            header, flat = read_arrays(file, self.KEY, TrainError)
            about = json.loads(header[self.KEY])
            good = isinstance(about, dict) and about.keys() >= {"phase", "step", "identity"}
            if not good:
                raise TrainError(f"{file} has another description than those of training")
        except (ValueError, RecursionError, OSError) as error:
            raise TrainError(
                f"{error}. Remove {file}, and the same command goes on at the state before"
            ) from error
        return about, flat, file
