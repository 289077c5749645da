"""Safetensors files: where each tensor lies, and the tensors themselves, mapped.

The library checks a file's header; it gives NumPy no 8-bit floats, so arrays are mapped here.
"""

import dataclasses
import json
import math
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from llm_jax import CheckpointError
from llm_jax.extras import need
from llm_jax.untrusted import require_file, unique, unreadable

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "F8_E8M0": np.dtype(jnp.float8_e8m0fnu),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
"""What a safetensors header calls the dtypes that parts of a weight have."""
FLOATS = ("F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Part:
    """One tensor of a file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    """The byte of the file where it begins."""

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def array(self) -> np.ndarray:
        """The tensor, mapped from the file."""
        if not self.bytes:  # nothing can be mapped
            return np.zeros(self.shape, DTYPES[self.dtype])
        try:
            data = np.memmap(self.file, np.uint8, "r")
        except OSError as error:  # too many open files, no permission: no fault of the bytes
            raise unreadable(self.file, error) from error
        return np.ndarray(self.shape, DTYPES[self.dtype], data, self.start)

    def floats(self) -> np.ndarray:
        """A fresh copy in float32; E8M0 is powers of two."""
        return self.array().astype(np.float32)


def safetensors():
    """The library; raises MissingPackage if it is not installed."""
    return need("safetensors", "models", "reading safetensors files")


def parts_of(file: Path) -> dict[str, Part]:
    """The tensors of a safetensors file by name.

    Raises CheckpointError if it is damaged, is no file, or describes a tensor twice.
    """
    library = safetensors()
    require_file(file)
    try:
        with library.safe_open(str(file), framework="numpy"), file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length), object_pairs_hook=unique)
    except OSError as error:  # too many open files, no permission: no fault of the bytes
        raise unreadable(file, error) from error
    except Exception as error:  # SafetensorError, or a name that is there twice
        raise CheckpointError(
            f"{file.name} is truncated or corrupt ({error}); download it again"
        ) from error
    header.pop("__metadata__", None)
    return {
        name: Part(
            file, name, tuple(about["shape"]), about["dtype"], 8 + length + about["data_offsets"][0]
        )
        for name, about in header.items()
    }
