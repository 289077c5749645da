"""What a trained model sees in images, folders and videos, drawn over them and as labels."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from rich.console import Console

from experiments.common.cli import UserError
from qyolop_jax import draw
from qyolop_jax.augment import letterbox_image
from qyolop_jax.config import IGNORE, ModelConfig
from qyolop_jax.evaluate import predictor
from qyolop_jax.formats import Bdd100kWriter, read_image
from qyolop_jax.postprocess import to_original
from qyolop_jax.readers import SUFFIXES
from qyolop_jax.scenes.clutter import need_cv2
from qyolop_jax.tidy import tidy

ROADS = Path(__file__).parents[1] / "checkpoints" / "roads-int8.safetensors"
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm")


class PredictError(UserError):
    """An input that cannot be read; the message says what can."""


@dataclasses.dataclass(frozen=True)
class Predict:
    """Boxes, drivable lanes and lines drawn over images or a video, and as BDD100K labels."""

    input: Path
    """An image, a folder of images, or a video."""
    run: Path = ROADS
    """Folder of `train`, or a file of `train` or `quantize`; default: what comes with this."""
    output: Path | None = None
    """A folder; for a video also a file name that ends in .mp4. Default: beside the run."""
    conf: float = 0.3
    """Least score of a box."""
    batch: int = 4
    tidy: bool = True
    """Draw areas smoothed and every line in one kind; labels stay as predicted."""
    labels: bool = True
    """Write BDD100K-format JSON and masks too (not for videos)."""


def pair(batch, p, b: int, cfg: ModelConfig):
    """(labels drawn over an image, predictions over the same), for a panel.

    Predicted masks are left out where none is labelled, as in the padding.
    """
    image, real, ours = batch["image"][b], batch["valid"][b], p.valid[b]
    nothing = (batch["area"][b] == IGNORE) & (batch["lane"][b] == IGNORE)
    truth = SimpleNamespace(
        boxes=batch["boxes"][b][real], classes=batch["classes"][b][real],
        crowd=batch["crowd"][b][real], area=batch["area"][b], lane=batch["lane"][b],
    )  # fmt: skip
    found = SimpleNamespace(
        boxes=p.boxes[b][ours], classes=p.classes[b][ours], scores=p.scores[b][ours],
        area=np.where(nothing, 0, p.area[b]), lane=np.where(nothing, 0, p.lane[b]),
    )  # fmt: skip
    return [draw.overlay(image, found_, cfg, conf=0.2, width=640) for found_ in (truth, found)]


def main(args: Predict, cfg: ModelConfig, forward, values, console: Console) -> int:
    path = args.input.expanduser()
    if not path.exists():
        raise PredictError(f"there is no {path}")
    both = predictor(forward, cfg, min(args.conf, 0.05))
    run = lambda images: both(values, images)
    if path.suffix.lower() in VIDEOS:
        return video(args, path, run, cfg, console)
    files = [path] if path.is_file() else sorted(
        f for f in path.iterdir() if f.suffix.lower() in SUFFIXES
    )  # fmt: skip
    if not files or files[0].suffix.lower() not in SUFFIXES:
        raise PredictError(
            f"{path}: expected {', '.join(SUFFIXES + VIDEOS)}, or a folder of images"
        )
    folder = args.output or Path("runs") / f"predict-{path.stem}"
    writer = Bdd100kWriter(folder, "val", cfg.detection)
    images = ((f.name, read_image(f)) for f in files)
    with progress(console, len(files)) as step:
        for n, (name, image, found) in enumerate(_found(images, run, cfg, args), 1):
            draw.save(folder / f"{Path(name).stem}.png", drawn(image, found, cfg, args))
            if args.labels:
                writer.add(name, found)
            step(n)
    if args.labels:
        writer.close()
    console.print(f"Written: {len(files)} images in {folder}", highlight=False)
    return 0


def video(args, path, run, cfg, console) -> int:
    cv2 = need_cv2()
    reader = cv2.VideoCapture(str(path))
    if not reader.isOpened():
        raise PredictError(f"{path} cannot be read as a video")
    rate = reader.get(cv2.CAP_PROP_FPS) or 25.0
    target = args.output or Path("runs") / f"predict-{path.stem}.mp4"
    if target.suffix.lower() != ".mp4":
        target = target / f"{path.stem}.mp4"
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{os.getpid()}-{target.name}")

    def frames():
        n = 0
        while True:
            there, frame = reader.read()
            if not there:
                return
            yield f"frame {n}", frame[..., ::-1]
            n += 1

    writer, count = None, 0
    total = int(reader.get(cv2.CAP_PROP_FRAME_COUNT))
    with progress(console, total) as step:
        for _, image, found in _found(frames(), run, cfg, args):
            shown = drawn(image, found, cfg, args)
            if writer is None:
                size = shown.shape[1], shown.shape[0]
                writer = cv2.VideoWriter(str(scratch), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
            writer.write(np.ascontiguousarray(shown[..., ::-1]))
            count += 1
            step(count)
    if writer is None:
        raise PredictError(f"{path} has no frames")
    writer.release()
    scratch.replace(target)
    console.print(f"Written: {count} frames in {target}", highlight=False)
    return 0


def progress(console: Console, total: int):
    from experiments.qyolop.__main__ import bar

    return bar(console, "Predicting", max(total, 1))


def drawn(image, found, cfg: ModelConfig, args: Predict) -> np.ndarray:
    return draw.overlay(image, tidy(found) if args.tidy else found, cfg, args.conf)


def _found(images, run, cfg: ModelConfig, args) -> Iterator:
    """(name, image, `postprocess.Found` at its original size) of each, `args.batch` at a time."""
    waiting = []

    def flush():
        boxed = [letterbox_image(image, cfg.size) for _, image in waiting]
        stack = np.stack([b for b, _ in boxed])
        full = np.concatenate([stack, np.repeat(stack[-1:], args.batch - len(stack), 0)])
        p = run(full)
        for b, (name, image) in enumerate(waiting):
            yield name, image, to_original(p, b, boxed[b][1])

    for item in images:
        waiting.append(item)
        if len(waiting) == args.batch:
            yield from flush()
            waiting = []
    if waiting:
        yield from flush()
