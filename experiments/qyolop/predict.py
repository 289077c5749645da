"""What a trained network finds in images, folders and videos: drawn over them, and as labels."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console

from experiments.common.cli import UserError
from llm_jax.extras import need
from llm_jax.files import atomic_file
from llm_jax.progress import bar
from qyolop_jax import draw
from qyolop_jax.formats import Bdd100kWriter, read_image
from qyolop_jax.network import Network, load
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
    """Runs the network over the input and writes what it finds."""
    if args.run is None and not ROADS.is_file():
        raise PredictError(
            f"{ROADS} is not there: the network for roads is part of the repository alone "
            "(experiments/checkpoints, for non-commercial use, as its data's terms say), not of an "
            "installed package. Run this in a clone of the repository, or give --run"
        )
    network = load(args.run or ROADS)
    path = args.input.expanduser()
    if not path.exists():
        raise PredictError(f"there is no {path}")
    if path.suffix.lower() in VIDEOS:
        return _video(args, path, network, console)
    files = [path] if path.is_file() else sorted(
        f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES
    )  # fmt: skip
    if not files or files[0].suffix.lower() not in IMAGE_SUFFIXES:
        raise PredictError(
            f"{path}: expected {', '.join(IMAGE_SUFFIXES + VIDEOS)}, or a folder of images"
        )
    folder = args.output or Path("runs") / f"predict-{path.stem}"
    writer = Bdd100kWriter(folder, "val", network.cfg.detection)
    images = ((f.name, read_image(f)) for f in files)
    with bar(console, "Predicting", len(files)) as step:
        for n, (name, image, found) in enumerate(_found(images, network, args), 1):
            draw.save_image(folder / f"{Path(name).stem}.png", _drawn(image, found, network, args))
            if args.labels:
                writer.add(name, found)
            step(n)
    if args.labels:
        writer.close()
    console.print(f"Written: {len(files)} images in {folder}", highlight=False)
    return 0


def _video(args: Predict, path: Path, network: Network, console: Console) -> int:
    cv2 = need("cv2", "vision", "reading a video")
    reader = cv2.VideoCapture(str(path))
    if not reader.isOpened():
        raise PredictError(f"{path} cannot be read as a video")
    rate = reader.get(cv2.CAP_PROP_FPS) or 25.0
    target = args.output or Path("runs") / f"predict-{path.stem}.mp4"
    if target.suffix.lower() != ".mp4":
        target = target / f"{path.stem}.mp4"

    def frames() -> Iterator[tuple[str, np.ndarray]]:
        n = 0
        while True:
            there, frame = reader.read()
            if not there:
                return
            yield f"frame {n}", frame[..., ::-1]
            n += 1

    writer, count = None, 0
    total = max(int(reader.get(cv2.CAP_PROP_FRAME_COUNT)), 1)
    with atomic_file(target) as scratch, bar(console, "Predicting", total) as step:
        for _, image, found in _found(frames(), network, args):
            shown = _drawn(image, found, network, args)
            if writer is None:
                size = shown.shape[1], shown.shape[0]
                writer = cv2.VideoWriter(str(scratch), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
            writer.write(np.ascontiguousarray(shown[..., ::-1]))
            count += 1
            step(count)
        if writer is None:
            raise PredictError(f"{path} has no frames")
        writer.release()
    console.print(f"Written: {count} frames in {target}", highlight=False)
    return 0


def _drawn(image: np.ndarray, found: Found, network: Network, args: Predict) -> np.ndarray:
    return draw.overlay(image, tidy(found) if args.tidy else found, network.cfg, args.conf)


def _found(
    images: Iterable[tuple[str, np.ndarray]], network: Network, args: Predict
) -> Iterator[tuple[str, np.ndarray, Found]]:
    """(name, image, what was found in it) of each, `args.batch` at a time."""
    waiting: collections.deque[tuple[str, np.ndarray]] = collections.deque()

    def pixels() -> Iterator[np.ndarray]:
        for item in images:
            waiting.append(item)
            yield item[1]

    for found in network.stream(pixels(), min(args.conf, 0.05), args.batch):
        yield *waiting.popleft(), found
