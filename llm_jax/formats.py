"""Which checkpoint a path holds: a folder of safetensors files, or a GGUF file."""

import re
import shlex
from pathlib import Path

from llm_jax import CheckpointError, shown
from llm_jax.adapter import is_adapter
from llm_jax.checkpoint import Checkpoint
from llm_jax.folder import INDEX, SafetensorsFolder
from llm_jax.gguf import GGUF
from llm_jax.gguf_parts import first_part, same_model
from llm_jax.untrusted import require_file, unreadable


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`: a folder with safetensors, a GGUF file or a folder with one.

    Of a GGUF model in several parts, any part may be given.
    """
    try:
        path = Path(path).expanduser()
        found = path.exists()
    except (OSError, RuntimeError) as error:  # RuntimeError: no such home folder
        raise unreadable(Path(path), error) from error
    if not found:
        raise CheckpointError(
            f"{path} does not exist; expected a folder with safetensors or a .gguf file"
        )
    if not path.is_dir():
        require_file(path)
        if path.suffix == ".gguf":
            return GGUF(first_part(path))
        hint = f"; pass its folder, {path.parent}" if path.suffix == ".safetensors" else ""
        raise CheckpointError(f"{path} is neither a folder with safetensors nor a .gguf file{hint}")
    if is_adapter(path):
        raise CheckpointError(
            f"{path} is an adapter, not a model: pass its base model, and this folder as the "
            "adapter (--adapter)"
        )
    if any(path.glob("*.safetensors")) or (path / INDEX).exists():
        return SafetensorsFolder(path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1 or same_model(ggufs):
        return GGUF(first_part(ggufs[0]))
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise CheckpointError(f"{path} holds several GGUF files; pass one of them: {shown(names)}")
    try:
        names = sorted(file.name for file in path.iterdir())
    except OSError as error:
        raise unreadable(path, error) from error
    if any(re.fullmatch(r"pytorch_model.*\.bin", name) for name in names):
        code = f"M.from_pretrained({str(path)!r}, dtype='auto').save_pretrained({str(path)!r})"
        code = f"from transformers import AutoModelForCausalLM as M; {code}"
        code = shlex.quote(code) if re.search(r'["$`\\!]', code) else f'"{code}"'
        raise CheckpointError(
            f"{path} has its weights in pytorch_model.bin, a kind of file that can run any code "
            f"when it is read; where you trust it, convert it once with torch: python -c {code}"
        )
    held = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise CheckpointError(
        f"{path} is not a checkpoint: it holds {shown(held) or 'nothing'}; "
        f"expected config.json and *.safetensors (with {INDEX} if there are several), "
        "or a .gguf file"
    )
