"""Packing blocks of an array on a GPU: meshring's kernels and the driver's 2-D copies.

Speed is a fraction of what the device copies in the same run: bytes read and written per second,
over those of a contiguous device-to-device copy of as many bytes. Medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from meshring import _core

REPEAT = 10  # enqueued between two events
ROWS = [4, 16, 64, 128, 512, 2048, 16384, 1 << 20]  # bytes of a block's row


class Moves:
    """One layout: the array, its packed blocks, and what moves them."""

    def __init__(self, cupy: Any, widths: list[int], total: int) -> None:
        self.widths = widths
        self.rows = max(1, total // sum(widths))
        self.nbytes = self.rows * sum(widths)
        words = cupy.arange(-(-self.nbytes // 4), dtype="u4") * np.uint32(2654435761)
        self.array = words.view("u1")[: self.nbytes]
        self.packed = cupy.empty_like(self.array)
        self.back = cupy.empty_like(self.array)
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.device = cupy.cuda.Device()
        self.device.synchronize()

    def pack(self, compiled: bool) -> None:
        """Enqueue the array's blocks to the packed buffer."""
        self._copy(self.array, True, compiled)

    def unpack(self, compiled: bool) -> None:
        """Enqueue the packed blocks to a second array."""
        self._copy(self.back, False, compiled)

    def copy(self) -> None:
        """Enqueue a contiguous copy of as many bytes."""
        self.back.data.copy_from_device_async(self.array.data, self.nbytes, self.stream)

    def _copy(self, array: Any, pack: bool, compiled: bool) -> None:
        _core._copy_blocks(
            array.data.ptr,
            self.packed.data.ptr,
            self.rows,
            self.widths,
            pack,
            stream=self.stream.ptr,
            compiled=compiled,
        )

    def check(self, compiled: bool) -> None:
        """Stop where the blocks are wrong: no speed of wrong bytes."""
        self.packed.fill(0)
        self.back.fill(0)
        self.device.synchronize()  # the buffers are filled on another stream
        self.pack(compiled)
        self.unpack(compiled)
        self.stream.synchronize()
        first = self.array.reshape(self.rows, -1)[:, : self.widths[0]]
        right = (self.packed[: first.size].reshape(first.shape) == first).all()
        if not (right and (self.back == self.array).all()):
            sys.exit(f"wrong bytes for blocks of {self.widths[:4]}...: a defect, please report it")


def seconds(cupy: Any, stream: Any, work: Callable[[], None]) -> float:
    """Device time of one execution."""
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record(stream)
    for _ in range(REPEAT):
        work()
    end.record(stream)
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3 / REPEAT


def measure(cupy: Any, widths: list[int], total: int, rounds: int) -> dict[str, Any]:
    """Return the rate of a plain copy and the fractions of it that each way reaches."""
    moves = Moves(cupy, widths, total)
    ways: dict[str, Callable[[], None]] = {"copy": moves.copy}
    for name, compiled in (("kernels", True), ("driver", False)):
        moves.check(compiled)
        ways[f"pack, {name}"] = lambda compiled=compiled: moves.pack(compiled)
        ways[f"unpack, {name}"] = lambda compiled=compiled: moves.unpack(compiled)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 1):  # the first round warms up
        for way, work in ways.items():
            times[way].append(seconds(cupy, moves.stream, work))
    best = {way: statistics.median(t[1:]) for way, t in times.items()}
    copy = best.pop("copy")
    return {
        "blocks": len(widths),
        "row_bytes": widths[0],
        "equal": len(set(widths)) == 1,
        "nbytes": moves.nbytes,
        "copy_GBps": 2 * moves.nbytes / copy / 1e9,
        "fractions": {way: copy / t for way, t in best.items()},
    }


def layouts(blocks: int) -> list[list[int]]:
    """Equal blocks of every row size; then uneven ones, and rows that only 4 bytes divide."""
    even = [[row] * blocks for row in ROWS]
    uneven = [[row if k % 2 else row // 2 * 3 for k in range(blocks)] for row in (512, 16384)]
    return [*even, *uneven, [516] * blocks, [2052] * blocks]


def device_of(cupy: Any) -> dict[str, Any]:
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    return {
        "name": properties["name"].decode(),
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "multiprocessors": properties["multiProcessorCount"],
        "cupy": cupy.__version__,
        "numpy": np.__version__,
        "kernels": _core.kernels_info(),
        "refused": _core.kernels_refused(0),
    }


def main() -> int:
    """Print the table; exit with 1 where --require is not reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=1 << 30, help="of the array (default 1 GiB)")
    parser.add_argument("--blocks", type=int, default=8, help="ranks (default 8)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument(
        "--require",
        type=float,
        help="least fraction that the kernels must reach from 512-byte rows",
    )
    args = parser.parse_args()
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        sys.exit(f"pack_gpu.py needs a GPU and CuPy (pip install '.[cu12]'): {error}")
    device = device_of(cupy)
    print(f"{device['name']}, {args.blocks} blocks; fractions of the device's own copy")
    if device["refused"]:
        print(f"no kernels: {device['refused']}")
    results = []
    for widths in layouts(args.blocks):
        result = measure(cupy, widths, args.bytes, args.rounds)
        results.append(result)
        cells = "  ".join(f"{way} {part:5.2f}" for way, part in result["fractions"].items())
        kind = "equal " if result["equal"] else "uneven"
        print(f"{kind} {widths[0]:>8} B rows: copy {result['copy_GBps']:7.0f} GB/s  {cells}")
    if args.json:
        args.json.write_text(json.dumps({"device": device, "results": results}, indent=2) + "\n")
    if args.require is None:
        return 0
    least = min(
        part
        for result in results
        if result["row_bytes"] >= 512
        for way, part in result["fractions"].items()
        if way.endswith("kernels")
    )
    print(f"least of the kernels from 512-byte rows: {least:.2f}, required {args.require}")
    return 0 if least >= args.require else 1


if __name__ == "__main__":
    sys.exit(main())
