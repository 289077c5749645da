"""Files of driving data: images, masks and boxes, read with clear errors; a writer for BDD100K.

Values of BDD100K masks. Drivable, one byte: 0 direct, 1 alternative, 2 background (before 2020: 0
background, 1 direct, 2 alternative). Lane, one byte: bits 0 to 2 what (0 crosswalk, 1 to 3 double,
4 curb, 5 to 7 single line), bit 3 background, bit 4 dashed, bit 5 across the road.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from llm_jax.extras import need
from llm_jax.files import atomic_file
from qyolop_jax import QyolopError
from qyolop_jax.config import IGNORE, UNKNOWN
from qyolop_jax.relabel import Object

CATEGORY_OUT = {
    "pedestrian": "pedestrian",
    "vehicle": "car",
    "scooter": "motorcycle",
    "bicycle": "bicycle",
}
"""Names of our classes in the BDD100K files that we write."""
LANE_OUT = {0: 255, 1: 6, 2: 2, 3: 6 | 16, IGNORE: 248, UNKNOWN: 249}
"""Our lane values in BDD100K's bits (white, along the road). 248 and 249 are our own, for pixels
that are ignored or of unknown kind; other readers see background, because bit 3 is set."""
AREA_OUT = {0: 2, 1: 0, 2: 1, IGNORE: 255, UNKNOWN: 254}


class ReadError(QyolopError):
    """A missing or broken file or folder; the message names it."""


def lane_table() -> np.ndarray:
    """[256] uint8: our value for each lane byte of BDD100K; curbs and crosswalks are background."""
    byte = np.arange(256)
    what, background, dashed = byte & 7, byte & 8, byte & 16
    table = np.zeros(256, np.uint8)
    line = background == 0
    table[line & (what >= 5)] = 1
    table[line & (what >= 1) & (what <= 3)] = 2
    table[line & (what >= 5) & (dashed > 0)] = 3
    table[LANE_OUT[IGNORE]], table[LANE_OUT[UNKNOWN]] = IGNORE, UNKNOWN
    return table


def value_table(of: dict[int, int], rest: int = IGNORE) -> np.ndarray:
    """[256] uint8 with these entries, and `rest` elsewhere."""
    full = np.full(256, rest, np.uint8)
    for value, ours in of.items():
        full[value] = ours
    return full


AREA_TABLES = {
    "masks": value_table({0: 1, 1: 2, 2: 0, 254: UNKNOWN}),
    "labels": value_table({0: 0, 1: 1, 2: 2}),
    "binary": value_table({0: 0}, rest=UNKNOWN),
}
LANE_TABLES = {"bits": lane_table(), "binary": value_table({0: 0}, rest=UNKNOWN)}


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ReadError(f"{path} does not exist") from error
    except OSError as error:
        raise ReadError(f"{path} cannot be read: {error}") from error
    if not data:
        raise ReadError(f"{path} is empty")
    return data


def read_image(path: Path) -> np.ndarray:
    """[H, W, 3] uint8 RGB, not rotated by EXIF, since labels are not. ReadError if broken."""
    cv2 = need("cv2", "vision", "reading and writing images")
    data = _bytes(path)
    cut = (data[:2] == b"\xff\xd8" and data.rfind(b"\xff\xd9") < len(data) // 2) or (
        data[:4] == b"\x89PNG" and b"IEND" not in data[-64:]
    )
    if cut:  # OpenCV would fill the rest with grey
        raise ReadError(f"{path} ends early; the image is truncated")
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise ReadError(f"{path} is corrupt: {error}") from error
    if image is None:
        raise ReadError(f"{path} is corrupt, or no image")
    return np.ascontiguousarray(image[..., ::-1])


def read_mask(path: Path, size: tuple[int, int], color: bool = False) -> np.ndarray:
    """[H, W] uint8 values (a palette's indices) or [H, W, 3] colours. ReadError if broken."""
    pillow = need("PIL.Image", "vision", "reading masks")
    data = _bytes(path)
    try:
        with pillow.open(io.BytesIO(data)) as file:
            if color:
                mask = np.asarray(file.convert("RGB"))
            elif file.mode in ("L", "P", "1"):
                mask = np.asarray(file).astype(np.uint8)
            else:
                raise ReadError(f"{path} has pixels of mode {file.mode}; expected one byte a pixel")
    except (OSError, SyntaxError) as error:
        raise ReadError(f"{path} is corrupt, or no image: {error}") from error
    if mask.shape[:2] != tuple(size):
        raise ReadError(
            f"{path} is {mask.shape[0]}x{mask.shape[1]}, its image {size[0]}x{size[1]}; a mask "
            "must have its image's size"
        )
    return mask


def colored_area(rgb: np.ndarray) -> np.ndarray:
    """Our area values for BDD100K's colour maps [H, W, 3]: red is direct, blue alternative."""
    red, blue = rgb[..., 0].astype(int), rgb[..., 2].astype(int)
    dark = rgb.max(-1) < 40
    return np.where(dark, 0, np.where(red >= blue, 1, 2)).astype(np.uint8)


def read_json(path: Path) -> Any:
    """The content of a JSON file. ReadError if it is missing or broken."""
    try:
        return json.loads(_bytes(path))
    except ValueError as error:
        if isinstance(error, ReadError):
            raise
        raise ReadError(f"{path} is no JSON: {error}") from error


def objects_of(entry: dict, where: str) -> list[Object]:
    """Boxes of one image in BDD100K's per-image or Scalabel layout; polygons become boxes.

    Lanes, areas and entries without geometry are left out. ReadError for another layout.
    """
    try:
        frames = entry.get("frames")
        labels = frames[0].get("objects") if frames else entry.get("labels")
        found = []
        for o in labels or ():
            category = str(o["category"])
            if category.startswith(("lane", "area", "drivable")):
                continue
            if box := o.get("box2d"):
                corners = tuple(float(box[k]) for k in ("x1", "y1", "x2", "y2"))
            elif poly := o.get("poly2d"):
                rings = [p["vertices"] for p in poly] if isinstance(poly[0], dict) else poly
                points = np.array([p[:2] for ring in rings for p in ring], np.float64)
                corners = (*map(float, points.min(0)), *map(float, points.max(0)))
            else:
                continue
            if not np.isfinite(corners).all():
                raise ValueError(f"box {corners}")
            crowd = o.get("crowd", (o.get("attributes") or {}).get("crowd", False))
            found.append(Object(category, corners, bool(crowd)))
        return found
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ReadError(
            f"{where}: not BDD100K's layout ({type(error).__name__}: {error}); expected "
            "frames[0].objects or labels, each with category and box2d x1, y1, x2, y2"
        ) from error


def write_png(path: Path, mask: ArrayLike) -> None:
    """Writes a mask, whole or not at all."""
    cv2 = need("cv2", "vision", "reading and writing images")
    _, data = cv2.imencode(".png", np.asarray(mask, np.uint8))
    _write(path, data.tobytes())


def _write(path: Path, data: bytes) -> None:
    with atomic_file(path) as scratch:
        scratch.write_bytes(data)


class Bdd100kWriter:
    """Writes labels or predictions in BDD100K's layout; `readers.Bdd100k` reads them back.

    `images/100k/SPLIT`, `labels/det_20/det_SPLIT.json` (Scalabel, with scores where there are
    any), `labels/drivable/masks/SPLIT`, `labels/lane/masks/SPLIT`. A context manager, because the
    JSON is written at the end.
    """

    def __init__(self, root: str | Path, split: str, classes: Sequence[str]):
        self.root, self.split, self.classes = Path(root), split, tuple(classes)
        self.entries: list[dict] = []

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.close()

    def add(self, name: str, found: Any, image: np.ndarray | None = None) -> None:
        """Adds the labels of an image, a `Sample` or `postprocess.Found`; the image if given."""
        stem = Path(name).stem
        known = getattr(found, "labelled", (True, True, True))
        scores, crowd = getattr(found, "scores", None), getattr(found, "crowd", None)
        if known[0]:
            labels = []
            for i, (box, kind) in enumerate(zip(found.boxes, found.classes, strict=True)):
                ours = self.classes[int(kind)]
                label = dict(
                    id=str(i),
                    category=CATEGORY_OUT.get(ours, ours),
                    box2d=dict(zip(("x1", "y1", "x2", "y2"), map(float, box), strict=True)),
                )
                if scores is not None:
                    label["score"] = float(scores[i])
                if crowd is not None:
                    label["attributes"] = dict(crowd=bool(crowd[i]))
                labels.append(label)
            self.entries.append(dict(name=f"{stem}.jpg", labels=labels))
        for task, out, there in (("drivable", AREA_OUT, known[1]), ("lane", LANE_OUT, known[2])):
            if there:
                values = found.area if task == "drivable" else found.lane
                folder = self.root / "labels" / task / "masks" / self.split
                write_png(folder / f"{stem}.png", value_table(out)[np.asarray(values)])
        if image is not None:
            cv2 = need("cv2", "vision", "reading and writing images")
            path = self.root / "images" / "100k" / self.split / f"{stem}.jpg"
            quality = [cv2.IMWRITE_JPEG_QUALITY, 95]
            _, data = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), quality)
            _write(path, data.tobytes())

    def close(self) -> None:
        """Writes the JSON of all images."""
        path = self.root / "labels" / "det_20" / f"det_{self.split}.json"
        _write(path, json.dumps(self.entries).encode())
