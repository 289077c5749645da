"""A trained network and what it finds in images: `load`, `predict`, `Network`.

network = load("model-int8.safetensors")
for found in network.predict([image]):            # uint8 RGB [H, W, 3], of any size
    print(found.boxes, [network.cfg.detection[c] for c in found.classes])
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from qyolop_jax.augment import letterbox_image
from qyolop_jax.config import ModelConfig
from qyolop_jax.formats import read_image
from qyolop_jax.graph import Graph
from qyolop_jax.integer import (
    IntegerModel,
    is_integer,
    load_integer_model,
    run_integer,
    save_integer_model,
)
from qyolop_jax.model import Panoptic
from qyolop_jax.postprocess import (
    Found,
    PostprocessError,
    Predictions,
    to_original,
    to_predictions,
)
from qyolop_jax.quantize import simulated_forward
from qyolop_jax.samples import SampleError
from qyolop_jax.scales import Settings
from qyolop_jax.weights import WeightsError, load_weights, save_weights

MODEL_FILE, INTEGER_FILE = "model.safetensors", "model-int8.safetensors"
"""Names of the float and of the integer network in the folder of a run."""

Forward = Callable[[Any, jax.Array], dict[str, jax.Array]]
"""(values, uint8 images [B, H, W, 3]) to raw outputs."""
Image = np.ndarray | str | Path
"""uint8 RGB [H, W, 3], or the path of an image file."""


@functools.cache
def float_forward(cfg: ModelConfig, dtype: DTypeLike = jnp.float32) -> Forward:
    """The network as it was trained, with its running statistics."""
    return lambda variables, images: Panoptic(cfg, dtype).apply(variables, images, train=False)


@functools.cache
def eight_bit_forward(graph: Graph, settings: Settings) -> Forward:
    """A folded graph in simulated eight bits; its values are "params" and "scales"."""
    return lambda v, images: simulated_forward(graph, v["params"], v["scales"], images, settings)


@functools.cache
def predictor(
    forward: Forward, cfg: ModelConfig, conf: float = 0.05
) -> Callable[[Any, Any], Predictions]:
    """A jitted function of values and uint8 images [B, H, W, 3] to `Predictions` in NumPy.

    PostprocessError for a `conf` that is no score.
    """
    if not 0 <= conf <= 1:
        raise PostprocessError(f"conf is {conf}; expected a score from 0 to 1")
    run = jax.jit(lambda values, images: to_predictions(forward(values, images), cfg, conf))
    return lambda values, images: jax.tree.map(np.asarray, run(values, images))


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A network that can be run: what its outputs mean, its forward function and its values."""

    cfg: ModelConfig
    forward: Forward
    values: Any
    """The variables of a float network, or an `IntegerModel`."""

    def predict(
        self, images: Image | Iterable[Image], conf: float = 0.3, batch: int = 4
    ) -> list[Found]:
        """What is found in each image, in pixels of that image: boxes, scores, classes, masks.

        One image is a list of one. `conf` is the least score of a box; `batch` images run at a
        time. Raises SampleError for an array that is not uint8 [H, W, 3], ReadError for a file that
        cannot be read.
        """
        if isinstance(images, str | Path) or getattr(images, "ndim", 0) == 3:
            images = [images]
        images = list(images)
        return list(self.stream(images, conf, max(1, min(batch, len(images)))))

    def stream(self, images: Iterable[Image], conf: float = 0.3, batch: int = 4) -> Iterator[Found]:
        """The same, one after the other, `batch` images read ahead: for videos and long lists."""
        if batch < 1:
            raise PostprocessError(f"batch is {batch}; expected 1 image or more")
        run, images = predictor(self.forward, self.cfg, conf), iter(images)
        while group := list(itertools.islice(images, batch)):
            boxed = [letterbox_image(_pixels(image), self.cfg.size) for image in group]
            stack = np.stack([image for image, _ in boxed])
            full = np.concatenate([stack, np.repeat(stack[-1:], batch - len(stack), 0)])
            found = run(self.values, full)
            for b, (_, transform) in enumerate(boxed):
                yield to_original(found, b, transform)

    def save(self, path: str | Path) -> None:
        """Writes the safetensors file that `load` reads. WeightsError for a simulated network."""
        if isinstance(self.values, IntegerModel):
            save_integer_model(dataclasses.replace(self.values, config=self.cfg), path)
        elif "scales" in self.values:
            raise WeightsError("a network in simulated eight bits has no file; save its integers")
        else:
            save_weights(Path(path), self.cfg, self.values)


def _pixels(image: Image) -> np.ndarray:
    pixels = read_image(Path(image)) if isinstance(image, str | Path) else np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise SampleError(
            f"image {pixels.dtype}{list(pixels.shape)}; expected uint8[H, W, 3], not empty"
        )
    return pixels


def load(path: str | Path, check: bool = True) -> Network:
    """The network in a file of `train` or `quantize`, float or integers; or in a run's folder.

    Every array is compared with its checksum, unless `check` is false. Raises WeightsError or
    IntegerError for anything else, and for a damaged file.
    """
    path = Path(path).expanduser()
    file = path / MODEL_FILE if path.is_dir() else path
    if not is_integer(file):
        cfg, variables = load_weights(file, check)
        return Network(cfg, float_forward(cfg), variables)
    model = load_integer_model(file, check)
    if model.config is None:
        raise WeightsError(f"{file} does not say its classes; make it again by `quantize`")
    return Network(model.config, run_integer, model)


def predict(
    network: Network | str | Path,
    images: Image | Iterable[Image],
    conf: float = 0.3,
    batch: int = 4,
) -> list[Found]:
    """What a network, or the network in a file, finds in images; see `Network.predict`."""
    network = network if isinstance(network, Network) else load(network)
    return network.predict(images, conf, batch)
