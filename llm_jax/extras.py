"""Packages that only some uses need: imported when they are, and asked for by name if missing."""

import importlib
from types import ModuleType


class MissingPackage(ImportError):
    """A package that this use needs is not installed; the message has the pip line."""


def need(module: str, extra: str, purpose: str) -> ModuleType:
    """The module, imported now. Raises `MissingPackage`, which names the extra that brings it.

    `purpose` completes the sentence "… needs cv2", such as "reading a video".
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # it is there, and something that it needs is broken
        raise MissingPackage(
            f"{purpose} needs {module}, which is not installed: pip install 'thimble-jax[{extra}]'"
        ) from error
