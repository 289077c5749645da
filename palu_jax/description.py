"""The description of a stored conversion: `palu.json`, which has a checksum of its own."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from llm_jax.config import Config
from llm_jax.digest import json_digest
from llm_jax.files import parse_json
from llm_jax.values import from_json
from palu_jax import PaluError
from palu_jax.convert import Recipe, check_recipe
from palu_jax.identity import Identity

NAME = "palu.json"
"""The file with the description."""
_VERSION = 2
_LARGEST = 2**26


class StoreError(PaluError):
    """A stored conversion that cannot be used or written; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """The description of a stored conversion; its arrays are not read yet."""

    folder: Path
    source: str
    cfg: Config
    recipe: Recipe
    base: Identity
    """The tensors of the model that the conversion left as they are."""
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    """Name of a file with factors -> its digest."""
    checksum: str = ""
    """That of the description and so, with its digests, of all files."""


@dataclasses.dataclass(frozen=True)
class _Described:
    """What the file holds."""

    version: int
    source: str
    config: Config
    recipe: Recipe
    base: Identity
    files: dict[str, str]
    checksum: str


def write_description(stored: StoredModel) -> None:
    """Writes the description into its folder."""
    described = dict(
        version=_VERSION,
        source=stored.source,
        config=dataclasses.asdict(stored.cfg),
        recipe=dataclasses.asdict(stored.recipe),
        base=dataclasses.asdict(stored.base),
        files=stored.files,
    )
    described = json.loads(json.dumps(described))  # tuples as lists
    described["checksum"] = _checksum(described)
    (stored.folder / NAME).write_text(json.dumps(described, indent=1))


def describe(folder: str | Path, verify: bool = True) -> StoredModel:
    """The description in a folder that `save` wrote; raises StoreError.

    `verify` False leaves out the checksum.
    """
    folder = Path(folder).expanduser().absolute()
    path = folder / NAME
    if not path.is_file():
        raise StoreError(
            f"{folder} is not a stored conversion: it has no {NAME}; make one with "
            "python -m experiments.palu --save FOLDER"
        )
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("it is too large")
        found = parse_json(path.read_bytes())
        if not isinstance(found, dict) or "version" not in found:
            raise ValueError("it has no version")
        if type(found["version"]) is int and found["version"] != _VERSION:
            raise StoreError(
                f"{folder} was written in format {found['version']}; this program reads "
                f"{_VERSION}: convert the model again"
            )
        described = from_json(_Described, found, NAME)
        if verify and described.checksum != _checksum(found):
            raise ValueError("it was changed: its checksum does not fit")
        check_recipe(described.config, described.recipe)
    except StoreError:
        raise
    except (ValueError, OSError) as error:
        raise StoreError(f"{path} is damaged ({error}); convert the model again") from error
    return StoredModel(
        folder, described.source, described.config, described.recipe, described.base,
        described.files, described.checksum,
    )  # fmt: skip


def _checksum(described: dict[str, Any]) -> str:
    """The digest of everything but the checksum, however the file is laid out."""
    return json_digest({name: value for name, value in described.items() if name != "checksum"})
