"""The data of `meshring bench`: inputs whose results are exact in any order, and their check.

All of it works on NumPy arrays and, through the same functions, on CuPy's.
"""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

# Inputs repeat after a prime number of elements: cheap to make and to check, while a block that
# lands at a wrong offset (offsets are powers of two and multiples of 16 bytes) still differs.
PERIOD = 8191
REDUCTIONS = ("sum", "prod", "min", "max", "mean")
ML_DTYPES = ("bfloat16", "float8_e4m3fn", "float8_e5m2")
DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128", *ML_DTYPES),
)
# Every integer up to here is exact in the type; larger types are cut off where it is plenty.
EXACT = {"bool": 1, "float16": 2048, "bfloat16": 256, "float8_e4m3fn": 16, "float8_e5m2": 8}
EXACT_PLENTY = 1 << 20


def dtype_of(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype called `name`; ImportError where it needs ml_dtypes."""
    if name in ML_DTYPES:
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return found
    return np.dtype(name)


def supports(dtype: str, op: str) -> bool:
    """Tell whether the reduction `op` is defined for `dtype` (NumPy's meaning)."""
    if op in ("min", "max"):
        return not dtype.startswith("complex")
    if op == "mean":
        return not dtype.startswith(("bool", "int", "uint"))
    return True


# ---------------------------------------------------------------- exact inputs and results


def _magnitudes(rng: np.random.Generator, dtype: str, top: int, shape: tuple[int, ...]) -> Array:
    low = 0 if dtype.startswith(("bool", "uint")) else -top
    return np.asarray(rng.integers(low, top, size=shape, endpoint=True))


def _limit(dtype: str) -> int:
    if dtype in EXACT:
        return EXACT[dtype]
    if dtype.startswith(("int", "uint")):
        return min(int(np.iinfo(dtype).max) - 1, EXACT_PLENTY)  # the maximum is the poison
    return EXACT_PLENTY


def _bits(rng: np.random.Generator, op: str | None, ranks: int) -> Array:
    # The rare value is the one that decides, so that one lost rank changes some results.
    decisive = rng.integers(0, 2 if op is None else ranks + 1, size=(ranks, PERIOD)) == 0
    return np.asarray(~decisive if op in ("prod", "min") else decisive)


def _real(rng: np.random.Generator, dtype: str, op: str | None, ranks: int) -> Array:
    shape = (ranks, PERIOD)
    if op == "sum":
        return _magnitudes(rng, dtype, max(1, _limit(dtype) // ranks), shape)
    if op == "mean":  # pairs of ranks hold (0, 2s) or (2s, 0), a rank left over s: the mean is s
        scale = rng.choice([-4, -2, -1, 1, 2, 4], size=PERIOD)
        values = np.tile(scale, (ranks, 1))
        flips = rng.integers(0, 2, size=(ranks // 2, PERIOD))
        values[0 : ranks // 2 * 2 : 2] *= 2 * flips
        values[1 : ranks // 2 * 2 : 2] *= 2 * (1 - flips)
        return values
    return _magnitudes(rng, dtype, _limit(dtype), shape)


def _factors(rng: np.random.Generator, dtype: str, ranks: int) -> Array:
    # All ranks hold 1 but two, drawn for each position: the product stays a small power of two.
    if dtype.startswith("complex"):
        choices = np.array([2, -1, 4, 1j, -2j])
    else:
        choices = np.array([2, 4] if dtype.startswith("uint") else [2, -1, 4, -2])
    values = np.ones((ranks, PERIOD), dtype=choices.dtype)
    for _ in range(2):
        values[rng.integers(0, ranks, size=PERIOD), np.arange(PERIOD)] *= rng.choice(
            choices, size=PERIOD
        )
    return values


def craft(dtype: np.dtype[Any], op: str | None, ranks: int, salt: int) -> Array:
    """Return every rank's input, one period of it: exact in `dtype` under `op` in any order.

    Shapes: (ranks, PERIOD). `op` None: data that is only moved.
    """
    rng = np.random.default_rng([salt, ranks])
    name = dtype.name
    if name == "bool":
        values = _bits(rng, op, ranks)
    elif op == "prod":
        values = _factors(rng, name, ranks)
    else:
        values = _real(rng, name, op, ranks)
        if dtype.kind == "c":
            values = values + 1j * _real(rng, name, op, ranks)
    if name in ML_DTYPES:
        values = values.astype(np.float32)
    return np.ascontiguousarray(values.astype(dtype))


def reduced(values: Array, op: str) -> Array:
    """Reduce `values` over ranks with NumPy: in rank order, half and smaller through float32."""
    dtype = values.dtype
    if dtype.name == "bool":
        return np.asarray(values.all(axis=0) if op in ("prod", "min") else values.any(axis=0))
    wide = np.dtype(np.float32) if dtype.name in EXACT else dtype
    combine = {"prod": np.multiply, "min": np.minimum, "max": np.maximum}.get(op, np.add)
    total = values[0].astype(wide)
    for row in values[1:]:
        total = combine(total, row.astype(wide))
    if op == "mean":
        total = total / wide.type(len(values))
    return np.asarray(total.astype(dtype))


def rolled(pattern: Array, start: int, target: Array) -> Array:
    """Return `pattern` from its element `start` on, where `target` is: on the host or a GPU."""
    pattern = np.roll(pattern, -start)
    if isinstance(target, np.ndarray):
        return pattern
    raw = pattern if pattern.dtype.kind != "V" else pattern.view(target.dtype)
    found: Array = sys.modules["cupy"].asarray(raw)
    return found


def fill(target: Array, pattern: Array, start: int = 0) -> None:
    """Write the periodic `pattern` into `target`, beginning with its element `start`."""
    pattern = rolled(pattern, start, target)
    whole = target.size // PERIOD * PERIOD
    target[:whole].reshape(-1, PERIOD)[...] = pattern
    target[whole:] = pattern[: target.size - whole]


def count_wrong(actual: Array, pattern: Array, start: int = 0) -> int:
    """Return how many elements of `actual` differ from the periodic `pattern` from `start` on."""
    wrong = 0
    on_host = isinstance(actual, np.ndarray)
    step = (128 if on_host else 1 << 14) * PERIOD  # on the host its temporary stays in cache
    pattern = rolled(pattern, start, actual)
    for begin in range(0, actual.size, step):
        piece = actual[begin : begin + step]
        whole = piece.size // PERIOD * PERIOD
        wrong += int(np.count_nonzero(piece[:whole].reshape(-1, PERIOD) != pattern))
        wrong += int(np.count_nonzero(piece[whole:] != pattern[: piece.size - whole]))
    return wrong


def spoil(target: Array, pattern: Array, start: int = 0) -> None:
    """Write values that are wrong everywhere, so that an element never written is noticed."""
    if target.dtype.name == "bool":
        fill(target, ~pattern, start)
    elif target.dtype.kind in "iu":
        target.fill(np.iinfo(target.dtype).max)
    else:
        target.fill(np.nan)
