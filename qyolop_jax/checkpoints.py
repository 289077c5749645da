"""What a run of training leaves on disk, so that a killed run continues: states and a log."""

import json
from pathlib import Path
from typing import Any

import jax

from llm_jax.extras import need
from llm_jax.files import atomic_file


class TrainingLog:
    """A file of JSON lines. `rewind` drops the lines that are newer than a checkpoint."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, **record: Any) -> None:
        """Appends one line."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def rewind(self, stage: int, step: int) -> None:
        """Keeps the whole lines up to this step of this stage."""
        if not self.path.exists():
            return
        lines = []
        for line in self.path.read_text().splitlines():
            try:
                r = json.loads(line)
            except json.JSONDecodeError:  # cut off by a kill
                continue
            if (r["stage"], r["step"]) <= (stage, step):
                lines.append(line + "\n")
        with atomic_file(self.path) as scratch:
            scratch.write_text("".join(lines))


class Checkpoints:
    """Training states on disk, through orbax: whole ones only, the two newest."""

    def __init__(self, folder: Path):
        self.ocp = need("orbax.checkpoint", "vision", "keeping checkpoints")
        options = self.ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.manager = self.ocp.CheckpointManager(Path(folder).absolute(), options=options)

    def newest(self) -> dict[str, Any] | None:
        """The description that was saved with the newest state; None where there is none."""
        at = self.manager.latest_step()
        if at is None:
            return None
        found = self.manager.restore(
            at, args=self.ocp.args.Composite(about=self.ocp.args.JsonRestore())
        )
        return found["about"]

    def restore(self, like: Any) -> Any:
        """The newest state, with the shapes, types and devices of `like`."""
        at = self.manager.latest_step()
        like = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like
        )
        args = self.ocp.args.Composite(state=self.ocp.args.StandardRestore(like))
        return self.manager.restore(at, args=args)["state"]

    def save(self, at: int, state: Any, about: dict[str, Any]) -> None:
        """Writes a state under the number `at`; returns when the disk has it."""
        args = self.ocp.args
        self.manager.save(
            at, args=args.Composite(state=args.StandardSave(state), about=args.JsonSave(about))
        )
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Releases the folder."""
        self.manager.close()
