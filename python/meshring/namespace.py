"""NumPy or CuPy: the module that an array belongs to, found and never imported for the user."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import numpy as np

from meshring.errors import UsageError


def namespace_of(x: Any) -> Any:
    """Return the module whose functions take x: cupy for a cupy.ndarray, else numpy."""
    module = type(x).__module__.partition(".")[0]
    return sys.modules["cupy"] if module == "cupy" else np


def as_array(x: Any, operation: str, argument: str) -> Any:
    """Return x if it is a NumPy or CuPy array, or refuse it with a sentence."""
    if isinstance(x, np.generic):
        return np.asarray(x)
    if isinstance(x, np.ma.MaskedArray) or not isinstance(x, namespace_of(x).ndarray):
        raise UsageError(
            f"{operation}: argument {argument!r} is a {type(x).__name__}; a NumPy or CuPy array is "
            "needed, for example numpy.asarray(x, dtype=...)"
        )
    return x


def dtype_of(dtype: Any) -> np.dtype[Any]:
    """Return a dtype from its name, those of ml_dtypes too."""
    try:
        found: Any = np.dtype(dtype)
    except TypeError:
        more: Any = sys.modules.get("ml_dtypes")
        if more is None and isinstance(dtype, str):
            try:
                more = import_module("ml_dtypes")
            except ImportError:
                raise UsageError(
                    f"dtype {dtype!r} is none of NumPy's; pip install ml_dtypes for bfloat16 and "
                    "float8"
                ) from None
        found = getattr(more, str(dtype), None)
        if found is None:
            raise UsageError(f"dtype {dtype!r} is none of NumPy's or ml_dtypes'") from None
        found = np.dtype(found)
    plain: np.dtype[Any] = found
    return plain
