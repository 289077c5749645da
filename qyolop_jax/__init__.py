"""Q-YOLOP in Flax: panoptic driving perception, trained in four stages, run in integers.

    network = qyolop_jax.load("model-int8.safetensors")
    found = qyolop_jax.predict(network, "road.jpg")
    network = qyolop_jax.train(samples, folder="run")

Every name but `QyolopError` is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qyolop_jax.augment import AugmentConfig
    from qyolop_jax.config import ModelConfig
    from qyolop_jax.evaluation import evaluate
    from qyolop_jax.foreign import QatRule, calibrate_inputs, integers, qat
    from qyolop_jax.losses import LossConfig
    from qyolop_jax.network import Network, load, predict
    from qyolop_jax.optimization import Optimization
    from qyolop_jax.postprocess import Found
    from qyolop_jax.recipe import four_stages, train
    from qyolop_jax.samples import Sample, make_sample
    from qyolop_jax.stages import Stage


class QyolopError(ValueError):
    """The base of this package's errors; their messages are for users."""


_HOMES = {  # name -> module; no name may be that of a module
    "AugmentConfig": "augment",
    "Found": "postprocess",
    "LossConfig": "losses",
    "ModelConfig": "config",
    "Network": "network",
    "Optimization": "optimization",
    "QatRule": "foreign",
    "Sample": "samples",
    "Stage": "stages",
    "calibrate_inputs": "foreign",
    "evaluate": "evaluation",
    "four_stages": "recipe",
    "integers": "foreign",
    "load": "network",
    "make_sample": "samples",
    "predict": "network",
    "qat": "foreign",
    "train": "recipe",
}

__all__ = [
    "AugmentConfig",
    "Found",
    "LossConfig",
    "ModelConfig",
    "Network",
    "Optimization",
    "QatRule",
    "QyolopError",
    "Sample",
    "Stage",
    "calibrate_inputs",
    "evaluate",
    "four_stages",
    "integers",
    "load",
    "make_sample",
    "predict",
    "qat",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
