"""Warnings that point at the user's line."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

# Frames in these folders are passed over.
_INSIDE = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


def warn_user(message: str) -> None:
    """Issue a UserWarning that names the first caller outside singd_ext and torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
