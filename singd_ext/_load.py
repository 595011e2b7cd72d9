"""Loads the compiled library, or says in one message why it does not load and how to rebuild it."""

from __future__ import annotations

import re
from types import ModuleType

import torch

_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def _built_with() -> str | None:
    """The torch release that the library on disk was compiled against, read without loading it."""
    from importlib.machinery import EXTENSION_SUFFIXES
    from pathlib import Path

    for suffix in EXTENSION_SUFFIXES:
        library = Path(__file__).with_name(f"_C{suffix}")
        if library.exists():
            match = re.search(rb"singd_ext built with torch ([^\0]+)\0", library.read_bytes())
            return match[1].decode() if match else "an unknown release"
    return None


def load() -> ModuleType:
    """Import `singd_ext._C`, which registers the operators.

    Raises:
        ImportError: If the library is missing or does not load, with the versions of torch that it
            was built with and that was found, the original error, and the command to rebuild.
    """
    built_with = _built_with()
    try:
        from . import _C
    except ImportError as error:
        state = f"was built with torch {built_with}" if built_with else "has not been built"
        raise ImportError(
            f"singd_ext's compiled library {state}; torch {torch.__version__} was found. "
            f"Rebuild it in singd_ext's source folder with `{_REBUILD}`. "
            f"The original error: {error}"
        ) from error
    if _release(_C.build_info()["torch"]) != _release(torch.__version__):
        raise ImportError(
            f"singd_ext's compiled library was built with torch {built_with}, but torch "
            f"{torch.__version__} was found, and the two do not fit together. Rebuild it in "
            f"singd_ext's source folder with `{_REBUILD}`."
        )
    return _C


def _release(version: str) -> list[str]:
    return version.split(".")[:2]
