"""Streams of batches from one or several data sets: mixed, augmented, resumable, reproducible.

Sample n of a stream depends only on the data sets, the settings and n. So the number of threads
changes nothing, and a restored stream continues with the batch that would have come next.
"""

import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax.extras import need
from qyolop_jax import QyolopError
from qyolop_jax.augment import GREY, AugmentConfig, augment, letterbox
from qyolop_jax.config import LARGEST_SIDE
from qyolop_jax.formats import ReadError
from qyolop_jax.postprocess import Transform
from qyolop_jax.samples import (
    Batch,
    Counted,
    Report,
    Sample,
    SampleError,
    caught,
    check_sample,
    collate,
    make_sample,
)

TRIES = 20  # this many broken samples in a row are an error
LEFT_OUT = "broken sample left out"
"""Why `in_order` counts a sample in its report."""


class SourceError(QyolopError):
    """Data sets or settings that cannot make a stream; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class Feed:
    """The settings of a stream of batches."""

    size: tuple[int, int]
    batch: int
    augment: AugmentConfig | None = None
    """None: images are letterboxed and not changed otherwise."""
    seed: int = 0
    max_boxes: int = 64
    """Places for boxes in an image of `batches`; `in_order` has room for all."""
    threads: int = 4
    """Threads that load and warp; 0 means the thread of the caller."""
    ahead: int = 2
    """Number of batches that are prepared in advance."""

    def __post_init__(self):
        if self.batch < 1 or self.threads < 0 or self.ahead < 1:
            raise SourceError(
                f"batch {self.batch}, threads {self.threads}, ahead {self.ahead}; expected at "
                "least 1, 0 and 1"
            )
        if self.max_boxes < 1:
            raise SourceError(f"max_boxes is {self.max_boxes}; expected 1 or more")
        if any(n < 32 or n % 32 or n > LARGEST_SIDE for n in self.size):
            raise SourceError(
                f"size is {self.size}; expected multiples of 32 (height, width), {LARGEST_SIDE} "
                "at most"
            )


def load_sample(dataset: Sequence[Sample], index: int, report: Report) -> Sample:
    """The sample, or if it is broken the next good one; `report` counts the broken ones.

    SourceError after `TRIES` broken samples.
    """
    count = len(dataset)
    for step in range(min(TRIES, count)):
        at = (index + step) % count
        try:
            s = dataset[at]
            return s if isinstance(dataset, Cached) else check_sample(s)
        except (ReadError, SampleError) as error:
            report.count("broken sample skipped", f"{at}: {error}")
            last = error
    raise SourceError(
        f"{min(TRIES, count)} samples in a row are broken, from {index} on; the last: {last}"
    )


def _mixed(datasets, weights) -> tuple[list[Sequence], np.ndarray]:
    """The data sets with a positive weight, and their weights, which sum to 1."""
    weights = {name: float(len(d)) for name, d in datasets.items()} if weights is None else weights
    if unknown := sorted(set(weights) - set(datasets)):
        raise SourceError(f"weights for {unknown}; there are the data sets {sorted(datasets)}")
    if any(not np.isfinite(w) or w < 0 for w in weights.values()):
        raise SourceError(f"weights {dict(weights)}; expected finite ones of 0 or more")
    used = [name for name in datasets if weights.get(name, 0) > 0]
    if not used:
        raise SourceError("no data set has a weight above 0")
    if empty := [name for name in used if not len(datasets[name])]:
        raise SourceError(f"the data sets {empty} are empty")
    shares = np.array([weights[name] for name in used])
    return [datasets[name] for name in used], shares / shares.sum()


def per_epoch(
    datasets: Mapping[str, Sequence], batch: int, weights: Mapping[str, float] | None = None
) -> int:
    """Batches in an epoch: about as many samples as the data sets of the mixture have."""
    used, _ = _mixed(datasets, weights)
    return max(sum(map(len, used)) // batch, 1)


def batches(
    datasets: Mapping[str, Sequence[Sample]],
    feed: Feed,
    weights: Mapping[str, float] | None = None,
    start: int = 0,
    report: Report | None = None,
) -> Any:
    """An endless iterator of `Batch`es from number `start` on; it has get_state and set_state.

    Every data set is shuffled again in each epoch. `weights` are the shares of samples from each
    data set, by name; None is in proportion to their sizes. A mosaic takes its four images from one
    data set, because only those have the same kinds of labels. A broken sample is replaced by the
    next good one; `report` counts that and boxes that do not fit, also in batches prepared ahead.
    """
    if start < 0:
        raise SourceError(f"start is {start}; expected a batch number from 0 on")
    grain = need("grain", "vision", "making batches")
    report = Report() if report is None else report
    used, shares = _mixed(datasets, weights)
    picks = [
        grain.MapDataset.range(len(d)).shuffle(seed=_seed(feed.seed, 0, k)).repeat().map(_pick(k))
        for k, d in enumerate(used)
    ]
    stream = grain.MapDataset.mix(picks, shares.tolist()) if len(picks) > 1 else picks[0]
    stream = stream.map_with_index(_Make(used, feed, report))
    if start:
        stream = stream.slice(slice(start * feed.batch, len(stream)))
    options = grain.ReadOptions(
        num_threads=feed.threads,
        prefetch_buffer_size=max(feed.threads and feed.ahead, 0) * feed.batch,
    )
    joined = lambda samples: collate(samples, feed.max_boxes, report)
    return iter(stream.to_iter_dataset(options).batch(feed.batch, batch_fn=joined))


def _seed(*numbers: int) -> int:
    """A seed of 32 bits, different for different numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _pick(k: int):
    return lambda index: (k, int(index))


@dataclasses.dataclass(frozen=True)
class _Make:
    """Makes the n-th sample of a stream from a pick (data set, index)."""

    datasets: list[Sequence]
    feed: Feed
    report: Report

    def __call__(self, n: int, pick: tuple[int, int]) -> Sample:
        k, index = pick
        dataset, cfg = self.datasets[k], self.feed.augment
        first = load_sample(dataset, index, self.report)
        if cfg is None:
            return letterbox(first, self.feed.size)[0]
        rng = np.random.default_rng([self.feed.seed, 1, int(n)])
        samples = [first]
        if rng.random() < cfg.mosaic:
            others = rng.integers(0, len(dataset), 3)
            samples += [load_sample(dataset, int(i), self.report) for i in others]
        return augment(samples, self.feed.size, rng, cfg)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A letterboxed batch of `loaded_in_order`."""

    batch: Batch
    originals: list[tuple[Sample, Transform]]
    """The samples and where they lie in the batch, whose other images are grey and unlabelled."""
    start: int
    end: int
    """The batch has the good samples of the data set from `start` to before `end`."""
    counted: list[Counted]
    """What reading them counted in a report."""


def in_order(
    dataset: Sequence[Sample], feed: Feed, report: Report | None = None
) -> Iterator[tuple[Batch, list[tuple[Sample, Transform]]]]:
    """Letterboxed batches of every sample once, with the original samples and their transforms.

    See `loaded_in_order`, which also says where a batch ends.
    """
    for found in loaded_in_order(dataset, feed, report):
        yield found.batch, found.originals


def loaded_in_order(
    dataset: Sequence[Sample], feed: Feed, report: Report | None = None, start: int = 0
) -> Iterator[Loaded]:
    """Letterboxed batches of every sample once, from number `start` on.

    The last batch is filled up with grey, unlabelled images. Every batch has places for all boxes
    of its images. Broken samples are left out and counted in `report`, as is all that their data
    set counts when they are read; without a report they are errors. Nothing is augmented, whatever
    `feed` says.
    """
    grain = need("grain", "vision", "making batches")

    def one(index):
        try:
            s = check_sample(dataset[int(index)])
        except (ReadError, SampleError) as error:
            if report is None:
                raise
            report.count(LEFT_OUT, f"{int(index)}: {error}")
            return None
        boxed, transform = letterbox(s, feed.size)
        if report is not None:
            report.count("box without an area on the grid", s.name, len(s.boxes) - len(boxed.boxes))
        return boxed, s, transform

    def counted(index):
        if report is None:
            return one(index), []
        with caught() as counts:
            return one(index), counts

    options = grain.ReadOptions(
        num_threads=feed.threads,
        prefetch_buffer_size=max(feed.threads and feed.ahead, 0) * feed.batch,
    )
    blank = make_sample(np.full((*feed.size, 3), GREY, np.uint8))
    waiting, counts, at = [], [], start
    joined = lambda: Loaded(*_joined(waiting, blank, feed), start, at, counts)
    for found, now in (
        grain.MapDataset.range(start, len(dataset)).map(counted).to_iter_dataset(options)
    ):
        at += 1
        counts += now
        for each in now:
            report.count(*each)
        waiting += [] if found is None else [found]
        if len(waiting) == feed.batch:
            yield joined()
            waiting, counts, start = [], [], at
    if waiting:
        yield joined()


def _joined(found, blank, feed):
    boxed = [b for b, _, _ in found] + [blank] * (feed.batch - len(found))
    most = max(1, *(len(b.boxes) for b in boxed))
    return collate(boxed, most), [(s, t) for _, s, t in found]


class Cached(Sequence):
    """A data set that keeps its samples in memory, shrunk to a longer side of `long_side` if given.

    Samples are checked once; a broken one is tried again each time. Threads may share one.
    """

    def __init__(self, dataset: Sequence[Sample], long_side: int | None = None):
        if long_side is not None and long_side < 32:
            raise SourceError(f"long_side is {long_side}; expected at least 32 pixels")
        self.dataset, self.long_side = dataset, long_side
        self._kept: dict[int, Sample] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        with self._lock:
            if index in self._kept:
                return self._kept[index]
        s = check_sample(self.dataset[index])
        if self.long_side is not None:
            s = shrunk(s, self.long_side)
        with self._lock:
            return self._kept.setdefault(index, s)


def shrunk(s: Sample, long_side: int) -> Sample:
    """The sample with its longer side at most this many pixels; tiny boxes are kept."""
    cv2 = need("cv2", "vision", "shrinking images")
    height, width = s.image.shape[:2]
    scale = long_side / max(height, width)
    if scale >= 1:
        return s
    to = (max(round(width * scale), 1), max(round(height * scale), 1))
    scales = np.array([to[0] / width, to[1] / height] * 2, np.float32)
    nearest = lambda mask: cv2.resize(mask, to, interpolation=cv2.INTER_NEAREST_EXACT)
    return dataclasses.replace(
        s,
        image=cv2.resize(s.image, to, interpolation=cv2.INTER_AREA),
        boxes=np.minimum(s.boxes * scales, np.array(to * 2, np.float32)),
        area=nearest(s.area),
        lane=nearest(s.lane),
    )
