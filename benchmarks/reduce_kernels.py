"""Speed of the reduction kernels on one core, against numpy.copyto of the same bytes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import ml_dtypes
import numpy as np

from meshring import _core

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
FLOATS = ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"]
DTYPES = ["bool", *INTEGERS, *FLOATS, "complex64", "complex128"]
OPS = ("sum", "prod", "min", "max", "mean")
SIZES = {"256 KiB": 1 << 18, "16 MiB": 1 << 24}


def supported(dtype: np.dtype, op: str) -> bool:
    """Tell whether meshring defines this operator on this type."""
    if op == "mean":
        return dtype.kind not in "biu"
    return dtype.kind != "c" or op in ("sum", "prod")


def seconds(call: Callable[[], object], repeat: int) -> float:
    """Return the median time of one call over 7 batches."""
    call()
    batches = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        batches.append((time.perf_counter() - start) / repeat)
    return sorted(batches)[3]


def measure(dtype: np.dtype, op: str, nbytes: int, isa: str) -> tuple[float, float]:
    """Return bytes per second of one array in place, and its ratio to numpy.copyto."""
    x, y = (np.ones(nbytes // dtype.itemsize, dtype) for _ in range(2))
    repeat = max(3, (1 << 25) // nbytes)
    copy = seconds(lambda: np.copyto(x.view("u1"), y.view("u1")), repeat)
    kernel = seconds(lambda: _core.reduce_arrays(op, [x, y], isa, out=x), repeat)
    return nbytes / kernel, copy / kernel


def main() -> None:
    """Print GB/s of the result and, in brackets, the speed as a ratio to numpy.copyto."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", default=_core.isas()[-1], choices=_core.isas())
    parser.add_argument("--dtype", nargs="*", default=DTYPES, choices=DTYPES, metavar="DTYPE")
    args = parser.parse_args()
    for title, nbytes in SIZES.items():
        print(f"2 inputs of {title}, {args.isa}: GB/s (ratio to numpy.copyto)")
        print(f"{'':14}" + "".join(f"{op:>14}" for op in OPS))
        for name in args.dtype:
            dtype = np.dtype(getattr(ml_dtypes, name, name))
            row = f"{name:14}"
            for op in OPS:
                cell = "-"
                if supported(dtype, op):
                    rate, ratio = measure(dtype, op, nbytes, args.isa)
                    cell = f"{rate / 1e9:.1f} ({ratio:.2f})"
                row += f"{cell:>14}"
            print(row)


if __name__ == "__main__":
    main()
