"""What every operation must return, computed by NumPy from the inputs of all ranks.

One list entry a rank throughout; None where a rank gets nothing. Reductions go in rank order, in
float32 for the floats that are narrower than that, and are rounded once, at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
NARROW = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
REALS = (*NARROW, "float32", "float64")
COMPLEX = ("complex64", "complex128")
DTYPES = ("bool", *INTEGERS, *REALS, *COMPLEX)
OPS = ("sum", "prod", "min", "max", "mean")


def dtype_of(name: str) -> np.dtype:
    """The NumPy dtype of one of DTYPES."""
    return np.dtype(getattr(ml_dtypes, name, name))


def supports(dtype: str, op: str) -> bool:
    """Whether the contract has this reduction (csrc/dtype.hpp says the same)."""
    if op in ("min", "max"):
        return dtype not in COMPLEX
    return op != "mean" or dtype in REALS or dtype in COMPLEX


# ---- comparison -----------------------------------------------------------------------------


def parts(a: np.ndarray) -> np.ndarray:
    """The real numbers an array is made of."""
    a = np.ascontiguousarray(a)
    return a.view(a.real.dtype) if a.dtype.kind == "c" else a


def is_nan(a: np.ndarray) -> np.ndarray:
    """NaN by position; nowhere in bools and integers."""
    if a.dtype.name in NARROW:
        a = a.astype("f4")
    return np.isnan(a) if a.dtype.kind == "f" else np.zeros(a.shape, bool)


def bits(a: np.ndarray) -> np.ndarray:
    """The bit patterns of real numbers, with one pattern for all NaNs."""
    pattern = a.view(f"u{a.dtype.itemsize}").copy()
    pattern[is_nan(a)] = np.iinfo(pattern.dtype).max  # is itself a NaN of every float type
    return pattern


def difference(got: Any, want: Any) -> str | None:
    """Say how two results differ, or None when they are equal bit for bit."""
    if not isinstance(want, np.ndarray):
        return None if got is want or got == want else f"{got!r} instead of {want!r}"
    if not isinstance(got, np.ndarray):
        return f"{got!r} instead of an array"
    if (got.dtype, got.shape) != (want.dtype, want.shape):
        return f"{got.dtype} {got.shape} instead of {want.dtype} {want.shape}"
    a, b = bits(parts(got).ravel()), bits(parts(want).ravel())
    wrong = np.flatnonzero(a != b)
    if wrong.size == 0:
        return None
    at = int(wrong[0])
    return (
        f"{wrong.size} of {a.size} numbers of {got.dtype} {got.shape} wrong, first at {at}: "
        f"{int(a[at]):#x} instead of {int(b[at]):#x}"
    )


# ---- reductions -----------------------------------------------------------------------------


def _select(op: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """min or max: a NaN in either place stays, and of equals (both zeros) the later one."""
    x, y = (v.astype("f4") if v.dtype.name in NARROW else v for v in (a, b))
    return np.where((x < y if op == "min" else x > y) | (x != x), a, b).astype(a.dtype)


def _complex_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """By the schoolbook formula, which NumPy does not promise."""
    out = np.empty_like(a)
    out.real = a.real * b.real - a.imag * b.imag
    out.imag = a.real * b.imag + a.imag * b.real
    return out


def reduced(xs: Sequence[np.ndarray], op: str) -> np.ndarray:
    """((x0 op x1) op x2) ... of arrays of one shape and dtype."""
    first = xs[0]
    if first.dtype == bool:
        return functools.reduce(
            np.logical_or if op in ("sum", "max") else np.logical_and, xs, first
        ).copy()
    if len(xs) == 1:
        return first.copy()
    if op in ("min", "max"):
        return functools.reduce(functools.partial(_select, op), xs)
    with np.errstate(all="ignore"):
        if first.dtype.kind == "c" and op == "prod":
            return functools.reduce(_complex_product, xs)
        narrow = first.dtype.name in NARROW
        step: Callable[..., Any] = np.multiply if op == "prod" else np.add
        total = functools.reduce(step, [x.astype("f4") if narrow else x for x in xs])
        if op == "mean":
            numbers = parts(total)
            total = (numbers / numbers.dtype.type(len(xs))).view(total.dtype)
        return np.asarray(total).reshape(first.shape).astype(first.dtype)


# ---- operations -----------------------------------------------------------------------------

Arrays = Sequence[np.ndarray]
Results = list["np.ndarray | None"]


def _line(x: np.ndarray) -> np.ndarray:
    """A 0-d array counts as one of length 1 where there is an axis."""
    return x.reshape(1) if x.ndim == 0 else x


def _cut(x: np.ndarray, axis: int, sizes: Sequence[int]) -> list[np.ndarray]:
    return np.split(_line(x), np.cumsum(sizes)[:-1], axis=axis)


def balanced(length: int, n: int) -> list[int]:
    """The lengths of numpy.array_split."""
    return [length // n + (i < length % n) for i in range(n)]


def all_reduce(xs: Arrays, op: str) -> Results:
    """Every rank gets the reduction."""
    return [reduced(xs, op)] * len(xs)


def reduce(xs: Arrays, op: str, root: int) -> Results:
    """The root gets the reduction."""
    return [reduced(xs, op) if r == root else None for r in range(len(xs))]


def broadcast(xs: Arrays, root: int) -> Results:
    """Every rank gets the root's array."""
    return [xs[root]] * len(xs)


def all_gather(xs: Arrays, axis: int) -> Results:
    """Every rank gets all arrays, one after the other along the axis."""
    return [np.concatenate([_line(x) for x in xs], axis)] * len(xs)


def gather(xs: Arrays, axis: int, root: int) -> Results:
    """The root gets all arrays, one after the other along the axis."""
    return [a if r == root else None for r, a in enumerate(all_gather(xs, axis))]


def scatter(x: np.ndarray, axis: int, sizes: Sequence[int]) -> Results:
    """Rank r gets the r-th piece of the root's array."""
    return list(_cut(x, axis, sizes))


def reduce_scatter(xs: Arrays, op: str, axis: int, sizes: Sequence[int]) -> Results:
    """Rank r gets the r-th piece of the reduction."""
    return scatter(reduced(xs, op), axis, sizes)


def all_to_all(xs: Arrays, axis: int, sizes: Sequence[Sequence[int]]) -> Results:
    """Rank r gets the r-th piece of every array, in rank order; sizes[i][j] is what i sends to j."""
    pieces = [_cut(x, axis, row) for x, row in zip(xs, sizes, strict=True)]
    return [np.concatenate([row[r] for row in pieces], axis) for r in range(len(xs))]


def shift(xs: Arrays, by: int) -> Results:
    """Rank r gets what rank r - by sent."""
    return [xs[(r - by) % len(xs)] for r in range(len(xs))]
