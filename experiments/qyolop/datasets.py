"""The data sets by name, and where each lies below --data-dir."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from llm_jax.digest import json_digest
from qyolop_jax.formats import ReadError
from qyolop_jax.readers import ApolloScape, Bdd100k, CamVid, TuSimple, TypedLanes
from qyolop_jax.samples import Report, Sample
from qyolop_jax.scenes import Scenes

DataName = Literal["scenes", "camvid", "apollo", "tusimple", "bdd100k", "typed-lanes"]
FOLDERS = {  # below --data-dir; the first that exists
    "camvid": ("driving/camvid", "camvid"),
    "apollo": ("driving/apollo_lane100", "apollo_lane100", "apollo"),
    "tusimple": ("driving/tusimple16/lanenet6", "tusimple"),
    "bdd100k": ("bdd100k",),
    "typed-lanes": ("typed-lanes", "ivs"),
}
HAS_BOXES = ("scenes", "camvid", "bdd100k", "typed-lanes")
HELD_OUT_SEED = 10**6
"""Seed of the scenes that are for evaluation."""


def dataset(
    name: str, split: str, data_dir: Path | None, scenes: Scenes, report: Report
) -> Sequence[Sample]:
    """The samples of a data set; for "scenes" it is `scenes`. ReadError where the folder is not."""
    if name == "scenes":
        return scenes
    root = _root(name, data_dir)
    if name == "camvid":  # lanes that a filter found are no truth to evaluate on
        return CamVid(root, split, lanes=split == "train", report=report)
    makers = dict(apollo=ApolloScape, tusimple=TuSimple, bdd100k=Bdd100k)
    return makers.get(name, TypedLanes)(root, split, report=report)


def data_identity(name: str, split: str, data_dir: Path | None, scenes: Scenes) -> Any:
    """What is another value when the samples are others, in types that JSON has.

    Of files it is names, sizes and times of the last change; the contents may be many gigabytes.
    """
    if name == "scenes":
        return [name, scenes.count, *scenes.size, scenes.seed]
    root = _root(name, data_dir)
    states = [(f.relative_to(root), f.stat()) for f in sorted(root.rglob("*")) if f.is_file()]
    files = [[str(path), state.st_size, state.st_mtime_ns] for path, state in states]
    return [name, split, json_digest(files)]


def _root(name: str, data_dir: Path | None) -> Path:
    """The folder of a data set. ReadError where it is not."""
    if name not in FOLDERS:
        raise ReadError(f"no data set {name!r}; there are scenes, {', '.join(FOLDERS)}")
    if data_dir is None:
        raise ReadError(f"the data set {name} needs --data-dir, a folder with {FOLDERS[name][0]}")
    there = [data_dir.expanduser() / f for f in FOLDERS[name]]
    root = next((f for f in there if f.is_dir()), None)
    if root is None:
        raise ReadError(f"{name}: none of {', '.join(map(str, there))} exists")
    return root
