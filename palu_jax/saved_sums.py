"""The sums of a calibration on disk, so that an interrupted one goes on where it was.

The file is an .npz: a header in JSON, and the sums "layer/number", each with a digest in the
header.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from llm_jax.config import Config
from llm_jax.digest import array_digest
from llm_jax.files import atomic_file
from llm_jax.values import from_json
from palu_jax import PaluError
from palu_jax.identity import Identity

_VERSION = 2


class CalibrationError(PaluError):
    """Statistics of another model or text, or unusable text; the message says what is wrong."""


@dataclasses.dataclass
class Sums:
    """The sums of every layer in float64, and over which text they are."""

    layers: list[list[np.ndarray]] = dataclasses.field(default_factory=list)
    batches: int = 0
    text: str = ""
    """The hash of the token ids of these batches."""

    def add(self, new: list[tuple], text: str) -> None:
        """Adds the sums of one more batch; `text` is the hash of all batches with it."""
        if self.layers:
            for old, layer in zip(self.layers, new, strict=True):
                for total, a in zip(old, layer, strict=True):
                    total += np.asarray(a)
        else:
            self.layers = [[np.asarray(a, np.float64) for a in layer] for layer in new]
        self.batches, self.text = self.batches + 1, text


@dataclasses.dataclass(frozen=True)
class _Header:
    version: int
    model: Identity
    cfg: Config
    gradients: bool
    batches: int
    text: str
    digests: dict[str, str]
    """Name of an array -> its digest."""


class SavedSums:
    """A file for the sums of one model."""

    def __init__(self, path: str | Path, model: Identity, cfg: Config, gradients: bool):
        self.path = Path(path).expanduser()
        self._model, self._cfg, self._gradients = model, cfg, gradients
        self._held = 0
        """The number of batches in the file."""

    def write(self, sums: Sums) -> None:
        """Replaces the file, if these are more batches than it has; raises CalibrationError."""
        if sums.batches == self._held:
            return
        arrays = {f"{i}/{j}": a for i, one in enumerate(sums.layers) for j, a in enumerate(one)}
        header = _Header(
            _VERSION, self._model, self._cfg, self._gradients, sums.batches, sums.text,
            {name: array_digest(a) for name, a in arrays.items()},
        )  # fmt: skip
        described = np.frombuffer(json.dumps(dataclasses.asdict(header)).encode(), np.uint8)
        try:
            with atomic_file(self.path) as scratch, scratch.open("wb") as file:
                np.savez(file, header=described, **arrays)
        except OSError as error:
            raise CalibrationError(
                f"the statistics cannot be written to {self.path} ({error.strerror or error}); "
                "make room or give another file"
            ) from error
        self._held = sums.batches

    def read(self) -> Sums | None:
        """What the file holds; None where there is no file. Raises CalibrationError."""
        path = self.path
        if not path.exists():
            return None
        try:
            sums = self._read()
        except CalibrationError:
            raise
        except Exception as error:  # zip, npy and JSON each fail in many ways
            raise CalibrationError(
                f"{path} is damaged ({type(error).__name__}: {error}); remove it and run again"
            ) from error
        self._held = sums.batches
        return sums

    def _read(self) -> Sums:
        if not self.path.is_file():
            raise ValueError("it is not a file")
        shapes = self._shapes()
        largest = 8 * max(int(np.prod(shape)) for shape in shapes.values())
        with self.path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            if max(part.file_size for part in found.zip.infolist()) > largest + 2**26:
                raise ValueError("an array is too large for this model")
            header = json.loads(found["header"].tobytes())
            if header["version"] != _VERSION:
                raise ValueError(f"it has version {header['version']}, not {_VERSION}")
            header = from_json(_Header, header, "the header")
            self._check(header)
            arrays = {name: found[name] for name in shapes}
        for name, shape in shapes.items():
            a = arrays[name]
            if a.shape != shape or a.dtype != np.float64:
                raise ValueError(f"{name} is {a.dtype} {a.shape}; expected float64 {shape}")
            if array_digest(a) != header.digests.get(name) or not np.isfinite(a).all():
                raise ValueError(f"{name} is not what was written")
        layers = [[a for n, a in arrays.items() if n.startswith(f"{i}/")]
                  for i in range(self._cfg.layers)]  # fmt: skip
        return Sums(layers, header.batches, header.text)

    def _check(self, header: _Header) -> None:
        """Raises CalibrationError where the file is of another model or another kind."""
        different = self._model.difference(header.model)
        if different is None and header.cfg != self._cfg:
            different = "config"
        if different is None and header.gradients != self._gradients:
            different = "with or without gradients"
        if different is not None:
            raise CalibrationError(
                f"{self.path} holds statistics of another model, or of another kind (different: "
                f"{different}); give another file or remove it"
            )
        if header.batches < 1:
            raise ValueError(f"it holds {header.batches} batches")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of all sums, in the order of `LayerStatistics`."""
        cfg = self._cfg
        D, K, H, F = cfg.d_model, cfg.kv_heads, cfg.head_dim, cfg.kv_heads * cfg.head_dim
        one = [(D, D), (D,), (K, H, H)] + [(F, F), (F, F), (D, F), (D, F)] * self._gradients
        return {f"{i}/{j}": shape for i in range(cfg.layers) for j, shape in enumerate(one)}
