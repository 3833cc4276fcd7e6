"""Makes NumPy arrays of what is not one, without a copy; the extension's slow path."""

from __future__ import annotations

from typing import Any

import numpy as np


def as_array(obj: Any, argument: str) -> Any:
    """Return an ndarray that shares memory with `obj`, or the sentence that refuses it."""
    if isinstance(obj, np.ma.MaskedArray):
        return (
            f"argument '{argument}' is a masked array, whose mask would be lost; "
            "send x.filled(value), or x.data and x.mask"
        )
    if isinstance(obj, np.ndarray):
        return obj.view(np.ndarray)
    if _is_on_a_device(obj):
        kind = f"{type(obj).__module__}.{type(obj).__name__}"
        return (
            f"argument '{argument}' is a device array ({kind}); this version of "
            "meshring has the host backend only: copy it to the host first, for example x.get()"
        )
    if isinstance(obj, (list, tuple, int, float, complex, str, type(None), np.generic)):
        return (
            f"argument '{argument}' is {_a(obj)}, an array is needed; "
            "make one with numpy.asarray(x, dtype=...)"
        )
    if hasattr(obj, "__array_interface__"):
        return np.asarray(obj)
    try:
        return np.asarray(memoryview(obj))
    except TypeError:
        pass
    if hasattr(obj, "__dlpack__"):
        try:
            return np.from_dlpack(obj)
        except Exception as error:  # what an exporter raises is its own
            return f"argument '{argument}' gave no host memory through DLPack: {error}"
    return (
        f"argument '{argument}' is {_a(obj)}, an array is needed: a numpy.ndarray, or anything "
        "with the buffer protocol or DLPack on the host"
    )


def _is_on_a_device(obj: Any) -> bool:
    try:
        return hasattr(obj, "__cuda_array_interface__")
    except Exception:  # CuPy asks the driver, which may be missing; torch's CPU tensors have none
        return True


def _a(obj: Any) -> str:
    return "None" if obj is None else f"a {type(obj).__name__}"
