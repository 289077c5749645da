"""Low-rank, quantized KV caches as transformations of parameters (Palu, arXiv 2407.21118).

    palu = palu_jax.compress(params, cfg, batches, keep=0.7, bits=4)

Importing it needs jax and numpy alone, and loads a module when one of its names is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any


class PaluError(ValueError):
    """The base of this package's errors; their messages are for users."""


if TYPE_CHECKING:
    from palu_jax.calibration import Statistics, calibrate
    from palu_jax.compression import Compression, Compressor, compress
    from palu_jax.convert import ConvertError, Recipe, to_palu
    from palu_jax.description import StoreError, describe
    from palu_jax.factors import FactorError, LowRank, Moment, low_rank
    from palu_jax.format import FormatError, LatentFormat, MixedFormat
    from palu_jax.own_attention import compress_nnx
    from palu_jax.own_forward import calibrate_nnx
    from palu_jax.planner import CachePlan, plan_cache
    from palu_jax.rank import (
        RankError,
        bytes_per_token,
        error_ranks,
        fisher_ranks,
        group_sizes,
        uniform_ranks,
    )
    from palu_jax.rival import KVFormat, kivi, to_quantized_cache
    from palu_jax.saved_sums import CalibrationError
    from palu_jax.store import PaluCheckpoint, restore, save

_HOMES = {  # name -> its module, imported when the name is first used; no module has such a name
    "CachePlan": "palu_jax.planner",
    "CalibrationError": "palu_jax.saved_sums",
    "Compression": "palu_jax.compression",
    "Compressor": "palu_jax.compression",
    "ConvertError": "palu_jax.convert",
    "FactorError": "palu_jax.factors",
    "FormatError": "palu_jax.format",
    "KVFormat": "palu_jax.rival",
    "LatentFormat": "palu_jax.format",
    "LowRank": "palu_jax.factors",
    "MixedFormat": "palu_jax.format",
    "Moment": "palu_jax.factors",
    "PaluCheckpoint": "palu_jax.store",
    "RankError": "palu_jax.rank",
    "Recipe": "palu_jax.convert",
    "Statistics": "palu_jax.calibration",
    "StoreError": "palu_jax.description",
    "bytes_per_token": "palu_jax.rank",
    "calibrate": "palu_jax.calibration",
    "calibrate_nnx": "palu_jax.own_forward",
    "compress": "palu_jax.compression",
    "compress_nnx": "palu_jax.own_attention",
    "describe": "palu_jax.description",
    "error_ranks": "palu_jax.rank",
    "fisher_ranks": "palu_jax.rank",
    "group_sizes": "palu_jax.rank",
    "kivi": "palu_jax.rival",
    "low_rank": "palu_jax.factors",
    "plan_cache": "palu_jax.planner",
    "restore": "palu_jax.store",
    "save": "palu_jax.store",
    "to_palu": "palu_jax.convert",
    "to_quantized_cache": "palu_jax.rival",
    "uniform_ranks": "palu_jax.rank",
}
__all__ = [
    "CachePlan",
    "CalibrationError",
    "Compression",
    "Compressor",
    "ConvertError",
    "FactorError",
    "FormatError",
    "KVFormat",
    "LatentFormat",
    "LowRank",
    "MixedFormat",
    "Moment",
    "PaluCheckpoint",
    "PaluError",
    "RankError",
    "Recipe",
    "Statistics",
    "StoreError",
    "bytes_per_token",
    "calibrate",
    "calibrate_nnx",
    "compress",
    "compress_nnx",
    "describe",
    "error_ranks",
    "fisher_ranks",
    "group_sizes",
    "kivi",
    "low_rank",
    "plan_cache",
    "restore",
    "save",
    "to_palu",
    "to_quantized_cache",
    "uniform_ranks",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
