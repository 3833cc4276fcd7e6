"""A perceptron with one hidden layer: its layers cut along mesh axis "tp", its batch along "dp".

The first layer is column-parallel, the second row-parallel: forward needs one all_reduce along tp,
backward one along dp for each gradient. With one rank along an axis nothing is sent along it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import meshring as mr

CUTS: dict[str, dict[str, int]] = {"w1": {"tp": 1}, "b1": {"tp": 0}, "w2": {"tp": 0}, "b2": {}}


def weights(inputs: int, hidden: int, outputs: int, seed: int = 0) -> dict[str, Any]:
    """Return the same random weights on every rank."""
    random = np.random.default_rng(seed)
    return {
        "w1": random.standard_normal((inputs, hidden)) * (2 / inputs) ** 0.5,
        "b1": np.zeros(hidden),
        "w2": random.standard_normal((hidden, outputs)) * (2 / hidden) ** 0.5,
        "b2": np.zeros(outputs),
    }


def shard_weights(whole: dict[str, Any], mesh: mr.DeviceMesh) -> dict[str, Any]:
    """Cut the weights over the mesh."""
    return {name: mr.DistributedTensor.shard(w, mesh, CUTS[name]) for name, w in whole.items()}


def softmax(logits: Any) -> Any:
    """Return the probabilities of each row; takes arrays and distributed tensors."""
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def forward(p: dict[str, Any], x: mr.DistributedTensor) -> tuple[Any, Any]:
    """Return the hidden layer and the probabilities."""
    hidden = np.maximum(x @ p["w1"] + p["b1"], 0)
    logits = (hidden @ p["w2"]).redistribute({"dp": 0}) + p["b2"]
    return hidden, softmax(logits)


def train_step(p: dict[str, Any], x: Any, y: Any, rate: float) -> float:
    """Do one step of gradient descent on a batch; return the loss. y: one row of 0 and 1 each."""
    hidden, probabilities = forward(p, x)
    loss = (np.log(probabilities) * y).sum() * (-1 / len(x))
    d = (probabilities - y) / len(x)
    d_hidden = (d @ p["w2"].T) * (hidden > 0)
    gradients = {
        "w1": x.T @ d_hidden,
        "b1": d_hidden.sum(axis=0),
        "w2": hidden.T @ d,
        "b2": d.sum(axis=0),
    }
    for name, gradient in gradients.items():
        p[name] -= rate * gradient.redistribute(p[name].placements)
    return float(loss.item())


def train_step_alone(p: dict[str, Any], x: Any, y: Any, rate: float) -> float:
    """The same step on one process, in plain NumPy: what the parallel one is checked against."""
    hidden = np.maximum(x @ p["w1"] + p["b1"], 0)
    probabilities = softmax(hidden @ p["w2"] + p["b2"])
    loss = -np.sum(np.log(probabilities) * y) / len(x)
    d = (probabilities - y) / len(x)
    d_hidden = (d @ p["w2"].T) * (hidden > 0)
    p["w2"] = p["w2"] - rate * (hidden.T @ d)
    p["b2"] = p["b2"] - rate * d.sum(axis=0)
    p["w1"] = p["w1"] - rate * (x.T @ d_hidden)
    p["b1"] = p["b1"] - rate * d_hidden.sum(axis=0)
    return float(loss)


def difference(parallel: dict[str, Any], alone: dict[str, Any]) -> float:
    """Return the largest difference between sharded weights and plain ones. Collective."""
    return max(float(abs(w.gather() - alone[name]).max()) for name, w in parallel.items())
