"""What a run of training leaves on disk, so that a killed run continues: states and a log."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from llm_jax.digest import array_digest, json_digest
from llm_jax.extras import need
from llm_jax.files import atomic_file
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
    """Training states on disk, through orbax: whole ones only, the two newest.

    With each state its description is kept, and a checksum of every array. What is damaged, and
    every error of orbax, is a TrainError.
    """

    def __init__(self, folder: Path):
        self.ocp = need("orbax.checkpoint", "vision", "keeping checkpoints")
        self.folder = Path(folder).absolute()
        options = self.ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        with self._named("{folder} cannot be opened: {error}; take another folder"):
            self.manager = self.ocp.CheckpointManager(self.folder, options=options)

    def newest(self) -> dict[str, Any] | None:
        """The description that was saved with the newest state; None where there is none."""
        at = self.manager.latest_step()
        if at is None:
            return None
        with self._named(DAMAGED, at):
            args = self.ocp.args.Composite(about=self.ocp.args.JsonRestore())
            kept = self.manager.restore(at, args=args)["about"]
            if kept["checksum"] != json_digest(_without_checksum(kept)):
                raise ValueError("its description does not have its checksum")
        return kept

    def restore(self, like: Any) -> Any:
        """The newest state, with the shapes, types and devices of `like`."""
        at, about = self.manager.latest_step(), self.newest()
        like = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like
        )
        with self._named(DAMAGED, at):
            args = self.ocp.args.Composite(state=self.ocp.args.StandardRestore(like))
            state = self.manager.restore(at, args=args)["state"]
            found, want = _checksums(state), (about or {})["arrays"]
            wrong = [n for n in found.keys() | want.keys() if found.get(n) != want.get(n)]
            if wrong:
                raise ValueError(f"{min(wrong)} does not have its checksum")
        return state

    def save(self, at: int, state: Any, about: dict[str, Any]) -> None:
        """Writes a state under the number `at`; returns when the disk has it."""
        about = json.loads(json.dumps(about | dict(arrays=_checksums(state))))
        about["checksum"] = json_digest(about)
        args = self.ocp.args
        with self._named("{folder}/{at} cannot be written: {error}; the same command resumes", at):
            self.manager.save(
                at, args=args.Composite(state=args.StandardSave(state), about=args.JsonSave(about))
            )
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Releases the folder."""
        self.manager.close()

    @contextlib.contextmanager
    def _named(self, message: str, at: int | None = None) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise errors of any type
            lines = str(error).strip().splitlines() or [""]
            why = f"{type(error).__name__}: {lines[0][:200]}"
            raise TrainError(message.format(folder=self.folder, at=at, error=why)) from error


DAMAGED = (
    "the checkpoint {folder}/{at} is damaged ({error}); remove that folder, and the same command "
    "goes on at the checkpoint before, or from the start"
)


def _without_checksum(about: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in about.items() if k != "checksum"}


def _checksums(state: Any) -> dict[str, str]:
    """By array: its shape, type and checksum."""
    return {
        jax.tree_util.keystr(path): f"{a.dtype}{list(a.shape)} {array_digest(a)}"
        for path, a in jax.tree_util.tree_leaves_with_path(state)
    }
