"""Which checkpoint a path holds: a folder of safetensors files, or a GGUF file."""

import re
from pathlib import Path

from llm_jax import CheckpointError
from llm_jax.checkpoint import Checkpoint
from llm_jax.folder import INDEX, SafetensorsFolder
from llm_jax.gguf import GGUF, MERGE


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`: a folder with safetensors, a GGUF file or a folder with one."""
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; expected a folder with safetensors or a .gguf file"
        )
    if path.is_file():
        if path.suffix == ".gguf":
            return GGUF(path)
        hint = f"; pass its folder, {path.parent}" if path.suffix == ".safetensors" else ""
        raise CheckpointError(f"{path} is neither a folder with safetensors nor a .gguf file{hint}")
    if any(path.glob("*.safetensors")) or (path / INDEX).exists():
        return SafetensorsFolder(path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return GGUF(ggufs[0])
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        if all(re.search(r"-\d{5}-of-\d{5}\.gguf$", file.name) for file in ggufs):
            raise CheckpointError(f"{path} holds the parts of a split file, {names}; {MERGE}")
        raise CheckpointError(f"{path} holds several GGUF files; pass one of them: {names}")
    inside = sorted(file.name for file in path.iterdir())
    shown = ", ".join(inside[:8]) + (f" and {len(inside) - 8} more" if len(inside) > 8 else "")
    raise CheckpointError(
        f"{path} is not a checkpoint: it holds {shown or 'nothing'}; "
        f"expected config.json and *.safetensors (with {INDEX} if there are several), "
        "or a .gguf file"
    )
