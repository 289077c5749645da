"""Folders of driving data as sequences of `Sample`s at their original size, loaded when asked for.

A missing folder is an error at once. A broken image, mask or JSON is a `ReadError` for its index;
`sources` skips and counts those. Where an image lacks a label file, that task is unlabelled. Boxes
are clipped to their image; `report` counts what is changed or left out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.extras import need
from qyolop_jax import formats
from qyolop_jax.config import AREA, DETECTION, IGNORE, LANE, UNKNOWN
from qyolop_jax.formats import MOST_PIXELS, ReadError
from qyolop_jax.relabel import relabel
from qyolop_jax.samples import TASKS, Report, Sample, check_sample, clip_boxes, make_sample

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
TYPED = dict(background=0, main=1, alternative=2, double=3, dashed=4, single=5)
"""Values of typed masks; a data set may have others."""


def images_in(folder: Path) -> list[Path]:
    """Images of a folder, sorted by name. ReadError if there are none, or two share a stem."""
    if not folder.is_dir():
        raise ReadError(f"there is no folder {folder}")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise ReadError(f"{folder} has no images ({', '.join(IMAGE_SUFFIXES)})")
    by_stem: dict[str, Path] = {}
    for path in found:
        if (other := by_stem.setdefault(path.stem, path)) is not path:
            raise ReadError(
                f"{folder} has {other.name} and {path.name}, whose labels would be the same files; "
                "rename one"
            )
    return found


class ImageFolder(Sequence):
    """The base of all readers: images by index, and the labels that `labels` finds for each."""

    def __init__(
        self, images: list[Path], split: str, classes: Sequence[str], report: Report | None
    ):
        self.images, self.split, self.classes = images, split, tuple(classes)
        self.report = Report() if report is None else report

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        path = self.images[index]
        image = formats.read_image(path)
        size = image.shape[:2]
        found = self.labels(path, size)
        if "boxes" in found:
            boxes, inside = clip_boxes(found["boxes"], *size)
            self.report.count("box with nothing inside its image", path.name, int((~inside).sum()))
            moved = (boxes != found["boxes"]).any(1) & inside
            self.report.count("box clipped to its image", path.name, int(moved.sum()))
            found.update(
                boxes=boxes[inside],
                classes=found["classes"][inside],
                crowd=found["crowd"][inside],
            )
        return check_sample(make_sample(image, name=path.stem, **found), self.classes)

    def labels(self, path: Path, size: tuple[int, int]) -> dict:
        """The labels of an image as arguments of `make_sample`; a missing one is unlabelled."""
        raise NotImplementedError

    def _boxes(self, entry: dict, path: Path) -> dict:
        boxes, classes, crowd = relabel(
            formats.objects_of(entry, path.name), self.classes, self.report, path.name
        )
        return dict(boxes=boxes, classes=classes, crowd=crowd)

    def _mask(self, task: str, path: Path, size, table, color: bool = False):
        """A mask through a table; None, and counted, if there is no file."""
        if not path.exists():
            self.report.count(f"image without {task} labels", path.name)
            return None
        mask = formats.read_mask(path, size, color)
        return formats.colored_area(mask) if color else table[mask]


class Bdd100k(ImageFolder):
    """BDD100K in its own layouts or in YOLOP's, whichever is under `root`.

    ReadError where one of `tasks` has no labels; None needs labels for one task at least.
    """

    IMAGES = ("images/100k/{split}", "images/{split}")
    BOXES = (
        "labels/det_20/det_{split}.json", "labels/bdd100k_labels_images_{split}.json",
        "labels/100k/{split}", "det_annotations/{split}",
    )  # fmt: skip
    AREAS = (
        # folder, what stands between an image's name and .png, values
        ("labels/drivable/masks/{split}", "", "masks"),
        ("labels/drivable/colormaps/{split}", "", "color"),
        ("drivable_maps/labels/{split}", "_drivable_id", "labels"),
        ("drivable_maps/color_labels/{split}", "_drivable_color", "color"),
        ("da_seg_annotations/{split}", "", "binary"),
    )
    LANES = (
        ("labels/lane/masks/{split}", "", "bits"),
        ("ll_seg_annotations/{split}", "", "binary"),
    )

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        classes: Sequence[str] = DETECTION,
        tasks: Sequence[str] | None = None,
        report: Report | None = None,
    ):
        root = Path(root)
        at = lambda pattern: root / pattern.format(split=split)
        there = [at(p) for p in self.IMAGES if at(p).is_dir()]
        if not there:
            raise ReadError(
                f"no images of {split} in {root}; expected {' or '.join(map(str, self.IMAGES))}"
            )
        super().__init__(images_in(there[0]), split, classes, report)
        first = lambda options: next((o for o in options if at(o[0]).is_dir()), None)
        self.area, self.lane = first(self.AREAS), first(self.LANES)
        self.root = root
        boxes = next((at(p) for p in self.BOXES if at(p).exists()), None)
        whole = boxes is not None and (boxes.suffix == ".json" or not boxes.is_dir())
        self.json_folder = None if whole else boxes
        self.entries = None
        if whole:
            content = formats.read_json(boxes)
            frames = content.get("frames") if isinstance(content, dict) else content
            self.entries = _by_stem(frames, boxes)
        present = dict(zip(TASKS, (boxes, self.area, self.lane), strict=True))
        missing = [t for t in tasks or () if present[t] is None]
        if missing or all(v is None for v in present.values()):
            folders = lambda options: [o[0] for o in options]
            searched = dict(zip(TASKS, (self.BOXES, *map(folders, (self.AREAS, self.LANES)))))
            wanted = missing or list(TASKS)
            lines = [f"{t} in {', '.join(searched[t])}" for t in wanted]
            raise ReadError(f"no labels of {split} in {root}; looked for " + "; ".join(lines))

    def labels(self, path: Path, size: tuple[int, int]) -> dict[str, Any]:
        """See `ImageFolder`."""
        found = {}
        if self.entries is not None:
            if path.stem in self.entries:
                found.update(self._boxes(self.entries[path.stem], path))
            else:
                self.report.count("image without detection labels", path.name)
        elif self.json_folder is not None:
            file = self.json_folder / f"{path.stem}.json"
            if file.exists():
                found.update(self._boxes(formats.read_json(file), path))
            else:
                self.report.count("image without detection labels", path.name)
        for task, option in (("area", self.area), ("lane", self.lane)):
            if option is None:
                continue
            folder, tail, values = option
            file = self.root / folder.format(split=self.split) / f"{path.stem}{tail}.png"
            tables = formats.AREA_TABLES if task == "area" else formats.LANE_TABLES
            found[task] = self._mask(task, file, size, tables.get(values), values == "color")
        return found


def _by_stem(frames: Any, file: Path) -> dict[str, dict]:
    """The entries of a JSON list by the names of their images without suffix. ReadError if odd."""
    if not isinstance(frames, list):
        raise ReadError(f"{file}: expected a list of images with name and labels")
    entries: dict[str, dict] = {}
    for number, entry in enumerate(frames):
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name:
            raise ReadError(
                f"{file}, entry {number}: {str(entry)[:60]!r}; expected an object with name and "
                "labels"
            )
        if entries.setdefault(Path(name).stem, entry) is not entry:
            raise ReadError(f"{file} has two entries for {Path(name).stem}; remove one")
    return entries


class TypedLanes(ImageFolder):
    """iVS-style folders: `images/SPLIT`, `masks/SPLIT` of one value a pixel, `det/SPLIT` if any.

    In such masks lanes cover the drivable area, so area is ignored there. `ids` are the values of
    the six kinds; boxes are in BDD100K's per-image JSON.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        classes: Sequence[str] = DETECTION,
        ids: dict[str, int] | None = None,
        report: Report | None = None,
    ):
        root = Path(root)
        super().__init__(images_in(root / "images" / split), split, classes, report)
        self.masks, self.det = root / "masks" / split, root / "det" / split
        if not self.masks.is_dir():
            raise ReadError(f"there is no folder {self.masks} of typed masks")
        ids = TYPED if ids is None else ids
        if set(ids) != set(TYPED):
            raise ReadError(f"ids name {sorted(ids)}; expected {sorted(TYPED)}")
        areas = {v: AREA.index(k) if k in AREA else IGNORE for k, v in ids.items()}
        lanes = {v: LANE.index(k) if k in LANE else 0 for k, v in ids.items()}
        self.tables = formats.value_table(areas), formats.value_table(lanes)

    def labels(self, path: Path, size: tuple[int, int]) -> dict[str, Any]:
        """See `ImageFolder`."""
        file = self.masks / f"{path.stem}.png"
        area = self._mask("mask", file, size, self.tables[0])
        found = {}
        if area is not None:
            found = dict(area=area, lane=self.tables[1][formats.read_mask(file, size)])
        if self.det.is_dir():
            file = self.det / f"{path.stem}.json"
            if file.exists():
                found.update(self._boxes(formats.read_json(file), path))
            else:
                self.report.count("image without detection labels", path.name)
        return found


class CamVid(ImageFolder):
    """CamVid with 11 classes: boxes, road as drivable area of unknown kind, derived lanes.

    The lanes (`lane_pseudo`) come from a filter, not from people. They are `UNKNOWN`, and for
    training only.
    """

    ROAD, UNLABELLED = 3, 11

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        classes: Sequence[str] = DETECTION,
        lanes: bool = True,
        report: Report | None = None,
    ):
        self.root = root = Path(root)
        super().__init__(images_in(root / "images" / split), split, classes, report)
        folders = ("det", "semantic", *(("lane_pseudo",) if lanes else ()))
        for folder in folders:
            if not (root / folder / split).is_dir():
                raise ReadError(f"there is no folder {root / folder / split}")
        self.lanes = lanes
        kinds = {i: 0 for i in range(11)} | {self.ROAD: UNKNOWN, self.UNLABELLED: IGNORE}
        self.table = formats.value_table(kinds)

    def labels(self, path: Path, size: tuple[int, int]) -> dict[str, Any]:
        """See `ImageFolder`."""
        at = lambda folder, suffix: self.root / folder / self.split / f"{path.stem}{suffix}"
        found = dict(area=self._mask("area", at("semantic", ".png"), size, self.table))
        if self.lanes:
            table = formats.LANE_TABLES["binary"]
            found["lane"] = self._mask("lane", at("lane_pseudo", ".png"), size, table)
        if at("det", ".json").exists():
            found.update(self._boxes(formats.read_json(at("det", ".json")), path))
        else:
            self.report.count("image without detection labels", path.name)
        return found


class ApolloScape(ImageFolder):
    """ApolloScape's lane marks, typed lanes only: `lane3` masks, or class ids in `label`."""

    IDS = formats.value_table(
        {200: 1, 204: 1, 206: 2, 207: 2, 209: 2, 201: 3, 203: 3, 255: IGNORE}, 0
    )

    def __init__(self, root: str | Path, split: str = "train", report: Report | None = None):
        root = Path(root)
        super().__init__(images_in(root / "images" / split), split, DETECTION, report)
        plain = formats.value_table({i: i for i in range(4)})
        options = ((root / "lane3" / split, plain), (root / "label" / split, self.IDS))
        there = [o for o in options if o[0].is_dir()]
        if not there:
            raise ReadError(f"no lanes of {split} in {root}; expected lane3/{split} or label/...")
        self.folder, self.table = there[0]

    def labels(self, path: Path, size: tuple[int, int]) -> dict[str, Any]:
        """See `ImageFolder`."""
        file = self.folder / f"{path.stem}.png"
        return dict(lane=self._mask("lane", file, size, self.table))


class TuSimple(ImageFolder):
    """TuSimple's lanes, of unknown kind: polylines drawn `width` pixels wide, or masks.

    `root` has `label_data*.json` (split train) or `test_label.json` (test), one JSON per line; or
    `image` and `gt_binary`, which have no splits.
    """

    def __init__(
        self, root: str | Path, split: str = "train", width: int = 8, report: Report | None = None
    ):
        self.root = root = Path(root)
        if width < 1:
            raise ReadError(f"lanes {width} pixels wide; expected at least 1")
        self.width, self.lines = width, None
        if (root / "gt_binary").is_dir():
            images = images_in(root / "image")
        else:
            pattern = {"train": "label_data*.json", "test": "test_label.json"}.get(split)
            files = sorted(root.glob(pattern)) if pattern else []
            if not files:
                raise ReadError(
                    f"no lanes of {split!r} in {root}; expected gt_binary/, label_data*.json "
                    "(train) or test_label.json (test)"
                )
            self.lines = {}
            for path, lanes in (entry for f in files for entry in self._entries(f)):
                if path in self.lines:
                    raise ReadError(f"{root} has two entries for {path}; remove one")
                self.lines[path] = lanes
            images = sorted(self.lines)
        super().__init__(images, split, DETECTION, report)

    def _entries(self, file: Path):
        for number, line in enumerate(formats.read_text(file).splitlines(), 1):
            if not line.strip():
                continue
            try:
                entry = formats.json.loads(line)
                rows = np.asarray(entry["h_samples"], np.float64)
                lanes = [np.asarray(l, np.float64) for l in entry["lanes"]]
                if rows.ndim != 1 or any(l.shape != rows.shape for l in lanes):
                    raise ValueError("lanes and h_samples differ in length")
                if not all((np.abs(a) < MOST_PIXELS).all() for a in (rows, *lanes)):
                    raise ValueError("a point is no place in an image")
                path = Path(entry["raw_file"])
                if path.is_absolute() or ".." in path.parts:
                    raise ValueError(f"raw_file {path} lies outside of the data set")
                yield self.root / path, (rows, lanes)
            except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
                raise ReadError(f"{file}, line {number}: not a TuSimple entry ({error})") from error

    def labels(self, path: Path, size: tuple[int, int]) -> dict[str, Any]:
        """See `ImageFolder`."""
        if self.lines is None:
            file = self.root / "gt_binary" / f"{path.stem}.png"
            return dict(lane=self._mask("lane", file, size, formats.LANE_TABLES["binary"]))
        cv2 = need("cv2", "vision", "drawing lanes")
        mask = np.zeros(size, np.uint8)
        rows, lanes = self.lines[path]
        for x in lanes:
            there = x >= 0  # -2: no point in that row
            points = np.stack([x, rows], 1)[there]
            flat = np.round(points * 16).astype(np.int32)[:, None]
            cv2.polylines(mask, [flat], False, UNKNOWN, self.width, cv2.LINE_8, 4)
        return dict(lane=mask)
