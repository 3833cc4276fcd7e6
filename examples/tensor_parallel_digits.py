"""Handwritten digits learnt by a tensor-parallel network: every rank has part of each layer.

    meshring run -n 4 examples/tensor_parallel_digits.py [--epochs 20] [--check]

Needs scikit-learn for its digits (pip install 'meshring[examples]').
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import mlp
import numpy as np

import meshring as mr


def digits() -> tuple[Any, Any, Any, Any]:
    """Return images and one-hot labels to learn from, then those to test with."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, hot = images[order] / 16, np.eye(10)[labels[order]]
    return images[:1500], hot[:1500], images[1500:], hot[1500:]


def train(
    mesh: mr.DeviceMesh,
    xp: Any,
    epochs: int,
    hidden: int = 130,
    batch: int = 250,
    rate: float = 0.5,
) -> tuple[dict[str, Any], list[float], float]:
    """Return the weights, the loss of each epoch's last batch, and the share of test hits."""
    x, y, x_test, y_test = (xp.asarray(a) for a in digits())
    whole = {k: xp.asarray(w) for k, w in mlp.weights(x.shape[1], hidden, 10).items()}
    p = mlp.shard_weights(whole, mesh)
    losses = []
    for _ in range(epochs):
        for start in range(0, len(x), batch):
            rows = slice(start, start + batch)
            xs = mr.DistributedTensor.shard(x[rows], mesh, {"dp": 0})
            ys = mr.DistributedTensor.shard(y[rows], mesh, {"dp": 0})
            loss = mlp.train_step(p, xs, ys, rate)
        losses.append(loss)
    _, found = mlp.forward(p, mr.DistributedTensor.shard(x_test, mesh, {"dp": 0}))
    hits = found.gather().argmax(axis=1) == y_test.argmax(axis=1)
    return p, losses, float(hits.mean())


def train_alone(
    epochs: int, hidden: int = 130, batch: int = 250, rate: float = 0.5
) -> tuple[dict[str, Any], list[float]]:
    """The same training in plain NumPy on one process."""
    x, y, _, _ = digits()
    p = mlp.weights(x.shape[1], hidden, 10)
    losses = []
    for _ in range(epochs):
        for start in range(0, len(x), batch):
            rows = slice(start, start + batch)
            loss = mlp.train_step_alone(p, x[rows], y[rows], rate)
        losses.append(loss)
    return p, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--arrays", default="numpy", help="numpy or cupy")
    parser.add_argument("--check", action="store_true", help="compare with one process")
    options = parser.parse_args()
    comm = mr.init()
    mesh = mr.DeviceMesh((1, comm.size), ("dp", "tp"), comm)
    xp = importlib.import_module(options.arrays)
    p, losses, hits = train(mesh, xp, options.epochs)
    if comm.rank == 0:
        print(f"loss {losses[0]:.4f} after 1 epoch, {losses[-1]:.4f} after {options.epochs}")
        print(f"{hits:.1%} of the test digits are right")
    print(f"rank {comm.rank} holds w1 {p['w1'].local_shape()} and w2 {p['w2'].local_shape()}")
    if options.check:
        off = mlp.difference(p, train_alone(options.epochs)[0])
        if comm.rank == 0:
            print(f"largest difference to one process: {off:.1e}")
    comm.close()


if __name__ == "__main__":
    main()
