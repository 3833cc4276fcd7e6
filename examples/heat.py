"""The heat equation on a plate cut into blocks: each step swaps edges with the neighbours.

    meshring run -n 4 examples/heat.py [--size 256] [--steps 2000] [--plot heat.png] [--check]

Explicit finite differences. Two edges of the plate are kept hot and two cold. Every rank owns a
block of a 2-D mesh, with one more cell on each side for the neighbours' values.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import numpy as np

import meshring as mr

RATE = 0.2  # of the diffusion, times the time step, by the squared distance of the cells


def exchange_edges(u: Any, mesh: mr.DeviceMesh) -> None:
    """Fill the outer cells of u with the neighbours' edges."""
    comm = mesh.communicator
    assert comm is not None
    inside = slice(1, -1)
    arriving = []
    with comm.group():
        for axis, name in enumerate(mesh.axis_names):
            for step, edge, outer in ((-1, 1, 0), (1, -2, -1)):
                peer = mesh.neighbor(name, step)
                if peer is None:
                    continue
                mine, theirs = ((i, inside) if axis == 0 else (inside, i) for i in (edge, outer))
                comm.send(u[mine].copy(), peer)
                arriving.append((theirs, comm.recv(u[theirs].shape, peer, u.dtype)))
    for where, values in arriving:
        u[where] = values


def step(u: Any) -> Any:
    """Return the inner cells one time step later."""
    around = u[:-2, 1:-1] + u[2:, 1:-1] + u[1:-1, :-2] + u[1:-1, 2:]
    return u[1:-1, 1:-1] + RATE * (around - 4 * u[1:-1, 1:-1])


def start(region: tuple[slice, ...], size: int, xp: Any) -> Any:
    """Return a region of the plate with its border: hot at the top and on the left, cold else."""
    u = xp.zeros([s.stop - s.start for s in region])
    if region[0].start == 0:
        u[0, :] = 1
    if region[1].start == 0:
        u[:, 0] = 1
    return u


def simulate(mesh: mr.DeviceMesh, size: int, steps: int, xp: Any) -> mr.DistributedTensor:
    """Return the plate without its border after so many steps, cut along both axes of the mesh."""
    spec = dict(zip(mesh.axis_names, (0, 1), strict=True))
    plate = mr.DistributedTensor.zeros((size, size), mesh, spec, like=xp.zeros(0))
    grown = tuple(slice(s.start, s.stop + 2) for s in plate.sharding.region(mesh.rank))
    u = start(grown, size, xp)
    for _ in range(steps):
        exchange_edges(u, mesh)
        u[1:-1, 1:-1] = step(u)
    return mr.DistributedTensor.from_local(u[1:-1, 1:-1].copy(), mesh, spec, plate.shape)


def simulate_alone(size: int, steps: int) -> Any:
    """The same on one process, in plain NumPy."""
    u = start((slice(0, size + 2), slice(0, size + 2)), size, np)
    for _ in range(steps):
        u[1:-1, 1:-1] = step(u)
    return u[1:-1, 1:-1]


def draw(plate: Any, sharding: mr.Sharding, path: str) -> None:
    """Write a picture of the plate, with the borders of the blocks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5))
    axes = figure.subplots()
    image = axes.imshow(plate, cmap="inferno", vmin=0, vmax=1)
    for rank in sharding.mesh.ranks.ravel():
        rows, columns = sharding.region(int(rank))
        axes.axhline(rows.start - 0.5, color="white", linewidth=0.5)
        axes.axvline(columns.start - 0.5, color="white", linewidth=0.5)
        axes.text(columns.start + 2, rows.start + 2, f"rank {rank}", color="white", va="top")
    axes.set(title="Heat equation", xlabel="column", ylabel="row")
    figure.colorbar(image, label="temperature")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--plot", metavar="FILE", help="write a picture (needs matplotlib)")
    parser.add_argument("--arrays", default="numpy", help="numpy or cupy")
    parser.add_argument("--check", action="store_true", help="compare with one process")
    options = parser.parse_args()
    comm = mr.init()
    mesh = mr.DeviceMesh.from_strategy(mr.ModelParallelStrategy.TENSOR, comm=comm)
    xp = importlib.import_module(options.arrays)
    plate = simulate(mesh, options.size, options.steps, xp)
    mean = plate.mean().item()
    whole = plate.gather(root=0)
    if comm.rank == 0:
        print(f"mean temperature {mean:.6f} after {options.steps} steps on {mesh.shape} blocks")
        host = whole if options.arrays == "numpy" else whole.get()
        if options.plot:
            draw(host, plate.sharding, options.plot)
            print(f"wrote {options.plot}")
        if options.check:
            off = abs(host - simulate_alone(options.size, options.steps)).max()
            print(f"largest difference to one process: {off:.1e}")
    comm.close()


if __name__ == "__main__":
    main()
