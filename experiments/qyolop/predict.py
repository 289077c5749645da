"""What a trained network finds in images, folders and videos: drawn over them, and as labels."""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments.common import records
from experiments.common.cli import UserError, fail
from experiments.qyolop.flags import (
    LARGEST_BATCH,
    FlagError,
    check_file,
    check_folder,
    check_range,
)
from llm_jax.digest import array_digest, file_digest, json_digest
from llm_jax.extras import need
from llm_jax.files import atomic_file, locked
from llm_jax.progress import bar
from qyolop_jax import draw
from qyolop_jax.formats import Bdd100kWriter, ReadError, read_image
from qyolop_jax.network import MODEL_FILE, Network, load
from qyolop_jax.postprocess import Found
from qyolop_jax.readers import IMAGE_SUFFIXES
from qyolop_jax.tidy import tidy

ROADS = Path(__file__).parents[1] / "checkpoints" / "roads-int8.safetensors"
"""The network for roads: in the repository, not in the wheel; non-commercial, as its data is."""
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm")


class PredictError(UserError):
    """An input that cannot be read; the message says what can be."""


@dataclasses.dataclass(frozen=True)
class Predict:
    """Boxes, drivable lanes and lines drawn over images or a video, and as BDD100K labels."""

    input: Path
    """An image, a folder of images, or a video."""
    run: Path | None = None
    """Folder of `train`, or a file of `train` or `quantize`; default: the network for roads that a
    clone of the repository has (non-commercial, as its data is)."""
    output: Path | None = None
    """A folder; for a video also a file name that ends in .mp4. Default: beside the run."""
    conf: float = 0.3
    """Least score of a box."""
    batch: int = 4
    tidy: bool = True
    """Draw smooth areas and one kind per line; labels stay as predicted."""
    labels: bool = True
    """Also write JSON and masks in BDD100K's format (not for videos)."""


def predict_command(args: Predict, console: Console) -> int:
    """Runs the network over the input and writes what it finds; 1 if an image is left out."""
    check_range(args, 0, 1, "conf")
    check_range(args, 1, LARGEST_BATCH, "batch")
    if args.run is None and not ROADS.is_file():
        raise PredictError(
            f"{ROADS} is not there: the network for roads is part of the repository alone "
            "(experiments/checkpoints, for non-commercial use, as its data's terms say), not of an "
            "installed package. Run this in a clone of the repository, or give --run"
        )
    path = args.input.expanduser()
    if not path.exists():
        raise PredictError(f"there is no {path}")
    if path.suffix.lower() in VIDEOS and path.is_file():
        return _video(args, path, console)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file()]
    if not files:
        raise PredictError(
            f"{path}: expected {', '.join(IMAGE_SUFFIXES + VIDEOS)}, or a folder of images"
        )
    folder = args.output or Path("runs") / f"predict-{path.stem}"
    if folder.suffix.lower() in IMAGE_SUFFIXES + VIDEOS and not folder.is_dir():
        raise FlagError(f"--output {folder} is the name of a file; expected a folder for images")
    if folder.resolve() == files[0].parent.resolve():
        raise FlagError(f"--output {folder} has the images, which would be replaced; take another")
    check_folder(folder)
    with locked(folder):
        return _images(args, files, folder, console)


class Progress:
    """What a run that was stopped has finished: its images, by name and content, and their labels.

    A file in the output folder, until all images are done. Other settings or another network begin
    anew.
    """

    def __init__(self, folder: Path, args: Predict):
        source = (args.run or ROADS).expanduser()
        network = file_digest(source / MODEL_FILE if source.is_dir() else source)
        self.settings = json_digest([network, args.conf, args.tidy, args.labels])
        self.path = folder / "predict.jsonl"
        found = records.read(self.path, ("name", "image", "settings", "entry"))
        known = [r for r in found if r["settings"] == self.settings]
        self.done = {(str(r["name"]), str(r["image"])): r["entry"] for r in known}

    def key(self, file: Path) -> tuple[str, str]:
        """How an image is known: its name and the checksum of its file."""
        return file.name, array_digest(np.fromfile(file, np.uint8))

    def add(self, file: Path, entry: dict | None) -> None:
        """Notes that the outputs of an image are on the disk."""
        name, image = self.key(file)
        records.append(self.path, dict(name=name, image=image, settings=self.settings, entry=entry))


def _images(args: Predict, files: list[Path], folder: Path, console: Console) -> int:
    network, bad, progress = load(args.run or ROADS), [], Progress(folder, args)
    writer = Bdd100kWriter(folder, "val", network.cfg.detection)
    unique = len({f.stem for f in files}) == len(files)
    stem = lambda file: file.stem if unique else file.name
    kept: list[Path] = []

    def is_done(file: Path) -> bool:
        if (folder / f"{stem(file)}.png").is_file() and progress.key(file) in progress.done:
            if not args.labels:
                return True
            return writer.keep(stem(file), progress.done[progress.key(file)])
        return False

    def images() -> Iterator[tuple[Path, np.ndarray]]:
        for file in files:
            if is_done(file):
                kept.append(file)
                continue
            try:
                image = read_image(file)
            except ReadError as error:
                fail(f"left out: {error}")
                bad.append(error)
                continue
            yield file, image

    with bar(console, "Predicting", len(files)) as step, contextlib.ExitStack() as stack:
        if args.labels:
            stack.enter_context(writer)
        done = 0
        for done, (file, image, found) in enumerate(_found(images(), network, args), 1):
            draw.save_image(folder / f"{stem(file)}.png", _drawn(image, found, network, args))
            if args.labels:
                writer.add(file.name, found, stem=stem(file))
            progress.add(file, writer.entries[-1] if args.labels else None)
            step(done + len(bad) + len(kept))
    progress.path.unlink(missing_ok=True)
    before = f", {len(kept)} of them before" if kept else ""
    console.print(
        f"Written: {done + len(kept)} images in {folder}{before}", highlight=False, markup=False
    )
    if not done and not kept:
        raise PredictError(f"none of {len(files)} images could be read; see above")
    if bad:
        fail(f"{len(bad)} of {len(files)} images are left out; see above")
    return 1 if bad else 0


def _video(args: Predict, path: Path, console: Console) -> int:
    cv2 = need("cv2", "vision", "reading a video")
    target = args.output or Path("runs") / f"predict-{path.stem}.mp4"
    if target.suffix.lower() in VIDEOS + IMAGE_SUFFIXES and target.suffix.lower() != ".mp4":
        raise FlagError(f"--output {target}: videos are written as .mp4; take such a name")
    if target.suffix.lower() != ".mp4":
        target = target / f"{path.stem}.mp4"
    check_file(target, path)
    reader = cv2.VideoCapture(str(path))
    if not reader.isOpened():
        raise PredictError(f"{path} cannot be read as a video")
    rate = reader.get(cv2.CAP_PROP_FPS)
    rate = rate if 0 < rate < 1000 else 25.0
    network = load(args.run or ROADS)

    def frames() -> Iterator[tuple[int, np.ndarray]]:
        for n in itertools.count():
            there, frame = reader.read()
            if not there:
                return
            yield n, frame[..., ::-1]

    writer, count, stopped = None, 0, False
    total = max(int(reader.get(cv2.CAP_PROP_FRAME_COUNT)), 1)
    with atomic_file(target) as scratch, bar(console, "Predicting", total) as step:
        try:
            for _, image, found in _found(frames(), network, args):
                shown = _drawn(image, found, network, args)
                if writer is None:
                    size = shown.shape[1], shown.shape[0]
                    kind = cv2.VideoWriter_fourcc(*"mp4v")
                    writer = cv2.VideoWriter(str(scratch), kind, rate, size)
                    if not writer.isOpened():
                        raise PredictError(f"{target} cannot be written as a video of {size}")
                writer.write(np.ascontiguousarray(shown[..., ::-1]))
                count += 1
                step(count)
        except KeyboardInterrupt:  # what is done is kept
            stopped = True
            if writer is None:
                raise
        if writer is None:
            raise PredictError(f"{path} has no frames")
        writer.release()
    console.print(f"Written: {count} frames in {target}", highlight=False, markup=False)
    if stopped:
        raise KeyboardInterrupt
    if count < total:
        fail(f"{path} says that it has {total} frames; {count} could be read")
    return 0


def _drawn(image: np.ndarray, found: Found, network: Network, args: Predict) -> np.ndarray:
    return draw.overlay(image, tidy(found) if args.tidy else found, network.cfg, args.conf)


def _found(
    images: Iterable[tuple[Any, np.ndarray]], network: Network, args: Predict
) -> Iterator[tuple[Any, np.ndarray, Found]]:
    """(key, image, what was found in it) of each (key, image), `args.batch` at a time."""
    waiting: collections.deque[tuple[Any, np.ndarray]] = collections.deque()

    def pixels() -> Iterator[np.ndarray]:
        for item in images:
            waiting.append(item)
            yield item[1]

    for found in network.stream(pixels(), min(args.conf, 0.05), args.batch):
        yield *waiting.popleft(), found
