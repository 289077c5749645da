"""Converted models for several cards: a folder for each card, with the model that it has."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax.cards import cut, cut_head
from llm_jax.checkpoint import Checkpoint
from llm_jax.config import Config
from llm_jax.digest import json_digest
from llm_jax.params import Layer, Params
from pallas_kernels.residual_decode.code import pad
from subspec_jax.residual.files import Converted
from subspec_jax.residual.split import Split


@dataclasses.dataclass(frozen=True)
class CardPart:
    """A card's part of a checkpoint, as `convert` reads it. `cfg` is always that of one card."""

    checkpoint: Checkpoint
    card: int

    def check(self, cfg: Config) -> None:
        self.checkpoint.check(self._whole(cfg))

    def digest(self) -> str:
        return json_digest([self.checkpoint.digest(), self.card])

    def experts_in_mxfp4(self, cfg: Config) -> bool:
        return False

    def read(self, field: str, cfg: Config) -> np.ndarray:
        array = self.checkpoint.read(field, self._whole(cfg))
        return cut_head(array, cfg, self.card) if field == "head_DV" else array

    def layer(self, index: int, cfg: Config) -> Layer:
        return cut(self.checkpoint.layer(index, self._whole(cfg)), index, cfg, self.card)

    def _whole(self, cfg: Config) -> Config:
        return self.checkpoint.config(cfg.dtype)


def card_folders(folder: Path, cards: int) -> list[Path]:
    """The folders of the cards' parts; of one card, the folder itself."""
    if cards == 1:
        return [folder]
    return [folder / f"card-{card + 1}-of-{cards}" for card in range(cards)]


def card_checkpoints(checkpoint: Checkpoint, cards: int) -> list[Any]:
    """What is converted to each of `card_folders`."""
    return [checkpoint] if cards == 1 else [CardPart(checkpoint, c) for c in range(cards)]


@dataclasses.dataclass(frozen=True)
class ConvertedParts:
    """The opened folders of all cards. All residuals are padded to the largest of any card, so that
    one program decodes them."""

    parts: tuple[Converted, ...]

    @property
    def cfg(self) -> Config:
        """The model that each card has."""
        return self.parts[0].cfg

    @property
    def tables(self) -> dict[str, np.ndarray]:
        """What all cards have."""
        return {k: a for k, a in self.parts[0].tables.items() if k != "head_DV"}

    @functools.cached_property
    def _room(self) -> list[dict[str, tuple[int, int]]]:
        most = lambda pairs: tuple(max(values) for values in zip(*pairs, strict=True))
        rooms = zip(*(part.room for part in self.parts), strict=True)
        return [{name: most([r[name] for r in of]) for name in of[0]} for of in rooms]

    def layer(self, index: int) -> list[Layer]:
        """Each card's layer, of the same shapes; see `Converted.layer`."""
        return [part.layer(index, self._room[index]) for part in self.parts]

    def heads(self) -> list[np.ndarray] | list[Split] | None:
        """Each card's columns of the output head, whole or in two parts; None: it is tied."""
        if self.cfg.tied:
            return None
        heads = [part.head for part in self.parts]
        if heads[0] is None:
            return [part.tables["head_DV"] for part in self.parts]
        found = [h for h in heads if h is not None]
        rows = max(h.residual.words.shape[0] for h in found)
        patches = max(h.residual.patches for h in found)
        same = lambda h: dataclasses.replace(h, residual=pad(h.residual, rows, patches))
        return list(map(same, found))

    def model(self, split_head: bool) -> Params:
        """The model that a card has, as shapes and dtypes."""
        found = self.parts[0].model_with(self._room)
        heads = self.heads()
        if not split_head or heads is None or not isinstance(heads[0], Split):
            return found
        shape = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
        return dataclasses.replace(found, head_DV=jax.tree.map(shape, heads[0]))

    def check(self, index: int | None = None) -> None:
        """Raises ResidualError if a file of a layer (None: of the tables) is damaged."""
        for part in self.parts:
            part.check(index)
