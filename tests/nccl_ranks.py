"""What the ranks of the NCCL tests have in common: CuPy arrays on the stand-in or on a real GPU."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

import numpy as np

import cases
import oracle
from standin import Standin

# Of sums, products and means on a real GPU, where NCCL chooses the order: relative to the result
# of rank order, beside as many roundings of the largest input.
TOLERANCE = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-6, "float64": 1e-14}
TOLERANCE |= {"complex64": 1e-6, "complex128": 1e-14}
LAYOUTS = ("c", "0-d", "out", "in place")


def can(case: cases.Case) -> bool:
    """Whether NCCL has such a call, on arrays that CuPy has."""
    if case.dtype.startswith("float8"):  # CuPy has no such dtype
        return False
    if case.operation not in cases.REDUCTIONS:
        return True
    if case.dtype in ("int16", "uint16"):
        return False
    return case.dtype not in oracle.COMPLEX or case.op != "prod"


def table(n: int, sizes: tuple[str, ...] = tuple(cases.SIZES)) -> list[cases.Case]:
    """The cases of n ranks that NCCL has."""
    return [c for c in cases.table([n], layouts=LAYOUTS, sizes=sizes) if can(c)]


def difference(case: cases.Case, got: Any, want: Any, exact: bool = True) -> str | None:
    """As oracle.difference, but for what NCCL leaves open.

    NaN: min and max drop it. Zeros of both signs are equal there. exact=False: the order of a sum.
    """
    numbers = isinstance(got, np.ndarray) and isinstance(want, np.ndarray)
    if not numbers or case.operation not in cases.REDUCTIONS or want.dtype.kind in "biu":
        return oracle.difference(got, want)
    if (got.dtype, got.shape) != (want.dtype, want.shape):
        return oracle.difference(got, want)
    a, b = (oracle.parts(v).astype("f8").ravel() for v in (got, want))
    if case.op in ("min", "max"):
        wrong = ~((a == b) | np.isnan(b))
    elif exact:
        return oracle.difference(got, want)
    else:
        with np.errstate(all="ignore"):
            near = np.abs(a - b) <= TOLERANCE[case.dtype] * case.ranks * (1 + np.abs(b))
        wrong = ~(near | (a == b) | ~np.isfinite(b) | ~np.isfinite(a))
    at = np.flatnonzero(wrong)
    return (
        f"{at.size} of {a.size} wrong, first {a[at[0]]} instead of {b[at[0]]}" if at.size else None
    )


def places() -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return what puts a NumPy array on this rank's device and what gets it back, wherever it is."""
    if "STANDIN_DIR" in os.environ:
        standin = Standin()
        standin.install()
        return standin.to_device, standin.to_host
    import cupy

    return cupy.asarray, cupy.asnumpy


def on_standin(standin: Standin) -> cases.Where:
    """CuPy arrays over the stand-in's memory."""

    def assign(x: Any, a: np.ndarray) -> None:
        source = np.ascontiguousarray(a)
        ctypes.memmove(x.data.ptr, source.ctypes.data, source.nbytes)

    return cases.Where(standin.to_device, standin.to_host, assign, difference, False)


def on_gpu() -> cases.Where:
    """CuPy arrays on a real GPU."""
    import cupy

    def assign(x: Any, a: np.ndarray) -> None:
        x[...] = cupy.asarray(a)

    return cases.Where(
        cupy.asarray,
        cupy.asnumpy,
        assign,
        lambda case, got, want: difference(case, got, want, exact=False),
        False,
    )
