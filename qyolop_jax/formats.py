"""Files of driving data: images, masks and boxes, read with clear errors; a writer for BDD100K.

Values of BDD100K masks. Drivable, one byte: 0 direct, 1 alternative, 2 background (before 2020: 0
background, 1 direct, 2 alternative). Lane, one byte: bits 0 to 2 what (0 crosswalk, 1 to 3 double,
4 curb, 5 to 7 single line), bit 3 background, bit 4 dashed, bit 5 across the road.
"""

import contextlib
import io
import json
import warnings
from collections.abc import Iterator, Sequence
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


MOST_PIXELS = 1024**3 // 4 // 3
"""Pixels of the largest image that is read, 89 million; above it Pillow warns of bombs."""
TURNS = {
    1: "", 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
    6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip
"""EXIF's orientation -> Pillow's name of what makes the image upright."""


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
    if path.exists() and not path.is_file():  # a pipe would be waited for without an end
        raise ReadError(f"{path} cannot be read: it is no file")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ReadError(f"{path} does not exist") from error
    except OSError as error:
        raise ReadError(f"{path} cannot be read: {error}") from error
    if not data:
        raise ReadError(f"{path} is empty")
    return data


def read_text(path: Path) -> str:
    """The text of a file. ReadError if it is missing, empty, or no UTF-8."""
    try:
        return _bytes(path).decode()
    except UnicodeDecodeError as error:
        raise ReadError(f"{path} is no text: {error}") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The image in a file as Pillow's, decoded and turned as its EXIF data says.

    ReadError if it is broken, has more than `MOST_PIXELS`, or is an animation.
    """
    pillow = need("PIL.Image", "vision", "reading images")
    data = _bytes(path)
    try:
        with warnings.catch_warnings():  # of EXIF data that is odd; viewers do not mind either
            warnings.filterwarnings("ignore", module="PIL")
            with pillow.open(io.BytesIO(data)) as file:
                if file.width * file.height > MOST_PIXELS:
                    raise ReadError(
                        f"{path} has {file.width}x{file.height} pixels; expected at most "
                        f"{MOST_PIXELS}, make it smaller"
                    )
                if getattr(file, "is_animated", False) and file.format != "MPO":
                    raise ReadError(f"{path} is an animation; expected one image")
                if file.format == "PNG":  # which has checksums that `load` leaves out
                    pillow.open(io.BytesIO(data)).verify()
                file.load()
                turn = _orientation(file)
                yield file if turn == 1 else file.transpose(pillow.Transpose[TURNS[turn]])
    except (ReadError, GeneratorExit):
        raise
    except pillow.UnidentifiedImageError as error:
        raise ReadError(f"{path} is corrupt, or no image") from error
    except pillow.DecompressionBombError as error:
        raise ReadError(f"{path} is too large: {error}") from error
    except Exception as error:  # Pillow's decoders raise errors of any type
        why = " ".join(str(error).split()) or type(error).__name__
        raise ReadError(f"{path} is corrupt, or no image: {why}") from error


def _orientation(file: Any) -> int:
    """How an image of Pillow's is to be turned, as a key of `TURNS`; 1 is upright."""
    try:
        found = file.getexif().get(0x0112, 1)
    except Exception:  # EXIF data that cannot be read turns nothing, as in every viewer
        return 1
    return found if found in TURNS else 1


def is_turned(path: Path) -> bool:
    """Whether the EXIF data of an image file turns it, so that its bytes alone are not upright."""
    with need("PIL.Image", "vision", "reading images").open(path) as file:
        return _orientation(file) != 1


def _rgb(path: Path, file: Any) -> np.ndarray:
    if file.mode.startswith("I;16") or (file.mode == "I" and file.format in (None, "PNG")):
        grey = (np.asarray(file) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, -1)
    if file.mode in ("I", "F"):
        raise ReadError(f"{path} has pixels of mode {file.mode}; expected 8 or 16 bits a value")
    if file.mode == "P" and "transparency" in file.info:
        file = file.convert("RGBA")
    return np.array(file.convert("RGB"))


def read_image(path: Path) -> np.ndarray:
    """[H, W, 3] uint8 RGB, upright as EXIF says, 16 bits cut to 8. ReadError if broken."""
    with _opened(path) as file:
        return _rgb(path, file)


def read_mask(path: Path, size: tuple[int, int], color: bool = False) -> np.ndarray:
    """[H, W] uint8 values (a palette's indices) or [H, W, 3] colours. ReadError if broken."""
    with _opened(path) as file:
        if color:
            mask = _rgb(path, file)
        elif file.mode in ("L", "P", "1"):
            mask = np.asarray(file).astype(np.uint8)
        else:
            raise ReadError(f"{path} has pixels of mode {file.mode}; expected one byte a pixel")
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
    data = _bytes(path)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ReadError(f"{path} is no JSON: {error}") from error


def objects_of(entry: Any, where: str) -> list[Object]:
    """Boxes of one image in BDD100K's per-image or Scalabel layout; polygons become boxes.

    Lanes, areas and entries without geometry are left out. ReadError for another layout.
    """
    try:
        frames = entry.get("frames")
        labels = frames[0].get("objects") if frames else entry.get("labels")
        found = []
        for o in _typed(labels or [], list):
            category = _typed(o["category"], str)
            if category.startswith(("lane", "area", "drivable")):
                continue
            if box := o.get("box2d"):
                corners = tuple(_number(box[k]) for k in ("x1", "y1", "x2", "y2"))
            elif poly := o.get("poly2d"):
                rings = [p["vertices"] for p in poly] if isinstance(poly[0], dict) else poly
                points = np.array([[_number(p[0]), _number(p[1])] for ring in rings for p in ring])
                corners = (*map(float, points.min(0)), *map(float, points.max(0)))
            else:
                continue
            crowd = o.get("crowd", (o.get("attributes") or {}).get("crowd", False))
            if crowd not in (0, 1):
                raise ValueError(f"crowd {crowd!r}")
            found.append(Object(category, corners, bool(crowd)))
        return found
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ReadError(
            f"{where}: not BDD100K's layout ({type(error).__name__}: {error}); expected "
            "frames[0].objects or labels, each with category and box2d x1, y1, x2, y2"
        ) from error


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{str(value)[:40]!r} is no {kind.__name__}")
    return value


def _number(value: Any) -> float:
    """A coordinate in pixels: finite, and small enough for every image."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{str(value)[:40]!r} is no number")
    if not -MOST_PIXELS < value < MOST_PIXELS:
        raise ValueError(f"{str(value)[:40]} is no place in an image")
    return float(value)


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
    JSON is written at the end, also after an error.
    """

    def __init__(self, root: str | Path, split: str, classes: Sequence[str]):
        self.root, self.split, self.classes = Path(root), split, tuple(classes)
        self.entries: list[dict] = []
        self.stems: set[str] = set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def add(
        self, name: str, found: Any, image: np.ndarray | None = None, stem: str | None = None
    ) -> None:
        """Adds the labels of an image, a `Sample` or `postprocess.Found`; the image if given.

        `name` is what the JSON calls it; an image is written as .jpg, so it is called that. Masks
        are called `stem`, by default the name without its suffix. ReadError if one has it already.
        """
        stem = Path(name).stem if stem is None else stem
        if stem in self.stems:
            raise ReadError(f"{name}: labels of another {stem} are written already; rename one")
        self.stems.add(stem)
        written = image is not None or not Path(name).suffix
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
            self.entries.append(
                dict(name=f"{stem}.jpg" if written else Path(name).name, labels=labels)
            )
        for task, out, there in (("drivable", AREA_OUT, known[1]), ("lane", LANE_OUT, known[2])):
            if there:
                values = found.area if task == "drivable" else found.lane
                write_png(self._mask(task, stem), value_table(out)[np.asarray(values)])
        if image is not None:
            cv2 = need("cv2", "vision", "reading and writing images")
            path = self.root / "images" / "100k" / self.split / f"{stem}.jpg"
            quality = [cv2.IMWRITE_JPEG_QUALITY, 95]
            _, data = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), quality)
            _write(path, data.tobytes())

    def keep(self, stem: str, entry: dict) -> bool:
        """Takes an entry that another writer made; False where its masks are not there."""
        masks = [self._mask(task, stem) for task in ("drivable", "lane")]
        there = all(mask.is_file() for mask in masks) and stem not in self.stems
        if there:
            self.stems.add(stem)
            self.entries.append(entry)
        return there

    def _mask(self, task: str, stem: str) -> Path:
        return self.root / "labels" / task / "masks" / self.split / f"{stem}.png"

    def close(self) -> None:
        """Writes the JSON of all images, sorted by name."""
        self.entries.sort(key=lambda entry: entry["name"])
        path = self.root / "labels" / "det_20" / f"det_{self.split}.json"
        _write(path, json.dumps(self.entries).encode())
