"""Tensors of another array module than NumPy: a stand-in named cupy, whose arrays must stay its."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import meshring as mr

X = np.arange(12.0).reshape(3, 4) + 1


class ndarray(np.ndarray):
    """An array on the host that says that it is CuPy's."""

    def get(self) -> np.ndarray:
        return np.array(self)


ndarray.__module__ = "cupy"


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    class Module(ModuleType):
        def __getattr__(self, name: str) -> Any:
            function = getattr(np, name)
            if not callable(function) or isinstance(function, type):
                return function

            def wrapped(*args: Any, **kwargs: Any) -> Any:
                found = function(*args, **kwargs)
                return found.view(ndarray) if isinstance(found, np.ndarray) else found

            return wrapped

    module = Module("cupy")
    module.ndarray = ndarray  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", module)
    yield module


def test_everything_stays_in_the_module_of_the_arrays(cupy: Any, tmp_path: Path) -> None:
    mesh = mr.DeviceMesh((1, 1), ("dp", "tp"))
    t = mr.DistributedTensor.shard(cupy.asarray(X), mesh, {"dp": 0, "tp": 1})
    t.to_file(tmp_path)
    row = mr.DistributedTensor.shard(cupy.asarray(X[0]), mesh)
    found = {
        "shard": (t, X),
        "function": (np.exp(t) + 2 * t - row, np.exp(X) + 2 * X - X[0]),
        "where": (np.where(t > 3, t, 0.0), np.where(X > 3, X, 0)),
        "clip": (np.clip(t, 2, 5), np.clip(X, 2, 5)),
        "sum": (t.sum(axis=0), X.sum(axis=0)),
        "mean": (t.mean(), X.mean()),
        "max": (t.max(axis=1, keepdims=True), X.max(axis=1, keepdims=True)),
        "matmul": (t.T @ t.redistribute({"dp": 0}), X.T @ X),
        "redistribute": (t.redistribute({"tp": 0}), X),
        "like": (mr.DistributedTensor.ones((3, 4), mesh, like=t.local_shard), np.ones((3, 4))),
        "zeros_like": (np.zeros_like(t), 0 * X),
        "astype": (t.astype("f4"), X.astype("f4")),
        "from_file": (mr.DistributedTensor.from_file(tmp_path, mesh, like=t.local_shard), X),
        "partial": (t.sum(axis=1).redistribute(), X.sum(axis=1)),
    }
    for name, (tensor, want) in found.items():
        assert type(tensor.local_shard) is ndarray, name
        assert tensor.xp is cupy
        np.testing.assert_allclose(tensor.local_shard.get(), want)
    assert type(t.gather()) is ndarray
    assert type(t[1:3]) is ndarray
