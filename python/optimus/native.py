"""The C++ extension. torch comes first: `_C` links against the libraries that torch loads."""

import torch  # noqa: F401

from . import _C

__all__ = ["_C"]
