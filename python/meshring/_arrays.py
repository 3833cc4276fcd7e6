"""Makes NumPy arrays of what is not one, without a copy; the extension's slow path."""

from __future__ import annotations

import sys
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
        return _cupy_array(obj, argument)
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


def _cupy_array(obj: Any, argument: str) -> Any:
    """Return a cupy.ndarray that shares memory with `obj`, which is on a GPU, or the refusal."""
    kind = f"{type(obj).__module__}.{type(obj).__name__}"
    cupy = sys.modules.get("cupy")
    if cupy is None:
        return (
            f"argument '{argument}' is on a GPU ({kind}), and CuPy is not imported; import cupy "
            "where it is installed (pip install 'meshring[cu12]'), or copy it to the host"
        )
    try:
        if hasattr(obj, "__dlpack__"):
            return cupy.from_dlpack(obj)
        return cupy.asarray(obj)
    except Exception as error:  # what an exporter raises is its own
        return f"argument '{argument}' ({kind}) cannot be shared with CuPy: {error}"


# ---- what the extension asks CuPy for on its slow paths


def device_empty(shape: tuple[int, ...], dtype: Any, device: int) -> Any:
    """Return a new array on that GPU, which is not CuPy's current one."""
    cupy = sys.modules["cupy"]
    with cupy.cuda.Device(device):
        return cupy.empty(shape, dtype)


def current_stream(device: int) -> Any:
    """Return CuPy's current stream of that GPU; each GPU has its own."""
    cupy = sys.modules["cupy"]
    with cupy.cuda.Device(device):
        return cupy.cuda.get_current_stream()


def stream_pointer(stream: Any) -> int | None:
    """Return the cudaStream_t of an object with the __cuda_stream__ protocol, else None."""
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is None:
        return None
    version_and_pointer = protocol() if callable(protocol) else protocol
    return int(version_and_pointer[1])


def _a(obj: Any) -> str:
    return "None" if obj is None else f"a {type(obj).__name__}"
