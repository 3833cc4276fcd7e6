"""Builds tests/device_kernels.cpp and calls it: the device kernels on the CPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
INT64 = ctypes.c_int64
UINT64 = ctypes.c_uint64


def int64s(values: Sequence[int]) -> ctypes.Array[INT64]:
    return (INT64 * max(1, len(values)))(*values)


@dataclass
class Moved:
    """What one call did."""

    enqueued: int
    kernel: str
    grid: int


class DeviceKernels:
    """csrc/device/kernels.cpp on a driver of the tests."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("g++")
        assert compiler, "these tests compile C++: install g++"
        library = folder / "device_kernels.so"
        sources = [ROOT / "tests/device_kernels.cpp", ROOT / "csrc/device/kernels.cpp"]
        flags = ["-std=c++17", "-O1", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}"]
        done = subprocess.run(
            [compiler, *flags, *map(str, sources), "-o", str(library)],
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        self.lib = ctypes.CDLL(str(library))
        self.lib.last_kernel.restype = ctypes.c_char_p
        self.lib.why_not.restype = ctypes.c_char_p
        self.lib.failed_launch.restype = ctypes.c_char_p
        self.lib.places.restype = UINT64
        self.lib.quotient.restype = UINT64

    def copy(
        self,
        widths: Sequence[int],
        rows: int,
        array: np.ndarray,
        packed: np.ndarray,
        *,
        pack: bool,
        spacing: int = 0,
        skip: int = -1,
        compiled: bool = True,
        processors: int = 2,
    ) -> Moved:
        """Move blocks between two arrays of bytes."""
        enqueued = self.lib.copy_blocks(
            int64s(widths),
            len(widths),
            INT64(rows),
            INT64(spacing),
            skip,
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_void_p(packed.ctypes.data),
            int(pack),
            int(compiled),
            processors,
        )
        return Moved(enqueued, self.lib.last_kernel().decode(), self.lib.last_grid())

    def places(
        self,
        widths: Sequence[int],
        rows: int,
        items: Sequence[int],
        *,
        bases: tuple[int, int],
        spacing: int = 0,
        skip: int = -1,
        which: int = 0,
    ) -> tuple[int, list[tuple[int, int]]]:
        """Return a launch's number of vectors and the two addresses of some of them."""
        count = len(items)
        array, packed = (UINT64 * count)(), (UINT64 * count)()
        work = self.lib.places(
            int64s(widths),
            len(widths),
            INT64(rows),
            INT64(spacing),
            skip,
            UINT64(bases[0]),
            UINT64(bases[1]),
            which,
            (UINT64 * count)(*items),
            count,
            array,
            packed,
        )
        return work, list(zip(array, packed, strict=True))

    def quotient(self, x: int, divisor: int, wide: bool) -> int:
        return int(self.lib.quotient(UINT64(x), UINT64(divisor), int(wide)))

    def layout_of_call(
        self,
        kind: int,
        shape: tuple[int, int, int],
        sizes: list[int],
        me: int,
        n: int,
        spacing: int,
        *,
        joins: bool,
    ) -> tuple[list[int], list[tuple[int, int]], bool]:
        """Return rows, pitch and packed bytes; width and offset of each block; whether equal."""
        out = (INT64 * (3 + 2 * n))()
        equal = self.lib.layout_of_call(
            kind,
            *map(INT64, shape),
            int64s(sizes),
            len(sizes),
            me,
            n,
            INT64(spacing),
            int(joins),
            out,
        )
        values = list(out)
        return values[:3], list(zip(values[3::2], values[4::2], strict=True)), bool(equal)
