"""A 2-D Fourier transform over ranks: rows, all_to_all, columns.

    meshring run -n 4 examples/fft2.py [--shape 1024 768] [--check]

Each rank transforms its rows, one redistribution from rows to columns (an all_to_all) turns the
array, and each rank transforms its columns. Then a low-pass filter and the way back.
"""

from __future__ import annotations

import argparse
import importlib
import time
from typing import Any

import numpy as np

import meshring as mr


def along(t: mr.DistributedTensor, transform: Any, axis: int) -> mr.DistributedTensor:
    """Transform a tensor along an axis that is whole on every rank."""
    local = transform(t.local_shard, axis=axis)
    return mr.DistributedTensor.from_local(local, t.mesh, t.placements, t.shape)


def fft2(rows: mr.DistributedTensor) -> mr.DistributedTensor:
    """Return the transform of a tensor cut by rows, cut by columns."""
    columns = along(rows, rows.xp.fft.fft, 1).redistribute(1)
    return along(columns, rows.xp.fft.fft, 0)


def ifft2(columns: mr.DistributedTensor) -> mr.DistributedTensor:
    """Return the inverse transform of a tensor cut by columns, cut by rows."""
    rows = along(columns, columns.xp.fft.ifft, 0).redistribute(0)
    return along(rows, columns.xp.fft.ifft, 1)


def low_pass(columns: mr.DistributedTensor, cutoff: float) -> mr.DistributedTensor:
    """Take away the frequencies above the cutoff, in cycles per sample."""

    def kept(region: tuple[slice, ...]) -> Any:
        xp = columns.xp
        across, down = (
            xp.fft.fftfreq(n)[cut] for n, cut in zip(columns.shape, region, strict=True)
        )
        return (across[:, None] ** 2 + down[None, :] ** 2 <= cutoff**2).astype("f8")

    mask = mr.DistributedTensor.from_function(kept, columns.shape, columns.mesh, columns.placements)
    return columns * mask


def picture(shape: tuple[int, int], xp: Any = np) -> Any:
    """Return a test image: smooth waves with noise on them."""
    i, j = np.meshgrid(*(np.arange(n) / n for n in shape), indexing="ij")
    noise = np.random.default_rng(0).standard_normal(shape)
    return xp.asarray(np.sin(12 * i) * np.cos(20 * j) + 0.5 * noise)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=[1024, 768])
    parser.add_argument("--arrays", default="numpy", help="numpy or cupy")
    parser.add_argument("--check", action="store_true", help="compare with one process")
    options = parser.parse_args()
    comm = mr.init()
    xp = importlib.import_module(options.arrays)
    mesh = mr.DeviceMesh(comm.size, "x", comm)
    image = picture(tuple(options.shape), xp)
    rows = mr.DistributedTensor.shard(image, mesh, 0)
    if comm.rank == 0:
        print(rows.astype("complex128").plan(1))
    start = time.perf_counter()
    spectrum = fft2(rows)
    smooth = ifft2(low_pass(spectrum, 0.1))
    seconds = time.perf_counter() - start
    rough = (abs(rows - smooth) ** 2).mean().item() ** 0.5
    if comm.rank == 0:
        print(
            f"transform, filter and back in {seconds * 1e3:.1f} ms; noise taken away: {rough:.3f}"
        )
    if options.check:
        off = float(abs(spectrum.gather() - xp.fft.fft2(image)).max())
        if comm.rank == 0:
            print(f"largest difference to one process: {off:.1e}")
    comm.close()


if __name__ == "__main__":
    main()
