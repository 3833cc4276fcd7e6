"""Data x tensor parallel training: the batch is cut along dp, each layer along tp.

    meshring run -n 4 examples/data_tensor_parallel.py [--dp 2] [--steps 200] [--check]

Learns which of three spirals a point is on. Ranks of one dp group hold the same weights and other
points; gradients are added up along dp.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import mlp
import numpy as np

import meshring as mr


def spirals(count: int, seed: int = 0) -> tuple[Any, Any]:
    """Return points on three spirals with a little noise, and which one each is on, one-hot."""
    random = np.random.default_rng(seed)
    arm = np.arange(count) % 3
    t = random.random(count)
    angle = 2 * np.pi * arm / 3 + 3.5 * t + 0.15 * random.standard_normal(count)
    points = np.stack([t * np.cos(angle), t * np.sin(angle)], axis=1)
    return points, np.eye(3)[arm]


def train(mesh: mr.DeviceMesh, xp: Any, steps: int, count: int = 602) -> tuple[Any, list[float]]:
    """Return the weights and the loss of each step."""
    x, y = (xp.asarray(a) for a in spirals(count))
    p = mlp.shard_weights({k: xp.asarray(w) for k, w in mlp.weights(2, 50, 3).items()}, mesh)
    xs = mr.DistributedTensor.shard(x, mesh, {"dp": 0})
    ys = mr.DistributedTensor.shard(y, mesh, {"dp": 0})
    return p, [mlp.train_step(p, xs, ys, 1.0) for _ in range(steps)]


def train_alone(steps: int, count: int = 602) -> tuple[Any, list[float]]:
    """The same training in plain NumPy on one process."""
    x, y = spirals(count)
    p = mlp.weights(2, 50, 3)
    return p, [mlp.train_step_alone(p, x, y, 1.0) for _ in range(steps)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dp", type=int, help="ranks along dp (2 where that divides)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--arrays", default="numpy", help="numpy or cupy")
    parser.add_argument("--check", action="store_true", help="compare with one process")
    options = parser.parse_args()
    comm = mr.init()
    dp = options.dp or (2 if comm.size % 2 == 0 else 1)
    mesh = mr.DeviceMesh((dp, comm.size // dp), ("dp", "tp"), comm)
    xp = importlib.import_module(options.arrays)
    p, losses = train(mesh, xp, options.steps)
    if comm.rank == 0:
        print(mesh)
        print(f"loss {losses[0]:.4f} at first, {losses[-1]:.4f} after {options.steps} steps")
    if options.check:
        off = mlp.difference(p, train_alone(options.steps)[0])
        if comm.rank == 0:
            print(f"largest difference to one process: {off:.1e}")
    comm.close()


if __name__ == "__main__":
    main()
