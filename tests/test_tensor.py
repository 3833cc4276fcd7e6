"""DistributedTensor: how it is made, what it says of itself, regions, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import meshring as mr

LIMIT = 20.0
X = np.arange(63.0).reshape(9, 7)
T = mr.DistributedTensor
ALONE = mr.DeviceMesh((1, 1), ("dp", "tp"))


def on(ranks: int, shape: tuple[int, ...], names: tuple[str, ...]) -> Callable[..., None]:
    """Run a test on a mesh, with ranks as threads."""

    def decorate(fn: Callable[[mr.DeviceMesh], None]) -> Callable[[], None]:
        def test() -> None:
            mr.run_local(lambda comm: fn(mr.DeviceMesh(shape, names, comm)), ranks, timeout=LIMIT)

        test.__name__ = fn.__name__
        test.__doc__ = fn.__doc__
        return test

    return decorate  # type: ignore[return-value]


@on(4, (4,), ("tp",))
def test_the_seed_s_fields(mesh: mr.DeviceMesh) -> None:
    t = T.zeros((128, 512), mesh, {"tp": mr.Shard(0, "ceil")})
    assert t.local_shape() == t.local_shard.shape == (32, 512)
    assert t.global_shape == t.shape == (128, 512)
    assert t.partition is not None
    assert t.partition.start_idx == 32 * mesh.rank
    assert t.partition.end_idx == 32 * (mesh.rank + 1)
    assert (t.partition.num_partitions, t.partition.partition_rank) == (4, mesh.rank)
    assert t.device_id == mesh.rank
    assert t.requires_communication()
    assert not T.ones((2, 2), mesh).requires_communication()
    assert T.ones((2, 2), mesh).partition is None
    assert len(t) == 128
    assert (t.ndim, t.size, t.nbytes, t.dtype) == (2, 65536, 65536 * 8, np.dtype("f8"))
    assert "Shard(0, 'ceil')" in repr(t)
    assert t.xp is np


@on(6, (2, 3), ("dp", "tp"))
def test_made_in_every_way(mesh: mr.DeviceMesh) -> None:
    spec = {"dp": 0, "tp": 1}
    t = T.shard(X, mesh, spec)
    region = t.sharding.region(mesh.rank)
    assert not np.shares_memory(t.local_shard, X)
    made = T.from_function(lambda r: X[r], X.shape, mesh, spec)
    assert made.sharding == t.sharding
    assert (made.local_shard == X[region]).all()
    known = T.from_local(X[region], mesh, spec, X.shape)
    assert (known.gather() == X).all()
    found = T.from_local(X[region], mesh, spec)
    assert found.sharding == t.sharding
    assert (T.full((3, 4), 2.5, mesh, spec, "f4").gather() == np.full((3, 4), 2.5, "f4")).all()
    assert T.ones((3,), mesh, {"tp": 0}, "bfloat16").dtype == ml_dtypes.bfloat16
    assert [p.split_dim for p in t.partitions] == [0, 1]


@on(3, (3,), ("x",))
def test_lengths_of_parts_are_found(mesh: mr.DeviceMesh) -> None:
    mine = np.full((2, (4, 0, 1)[mesh.rank]), mesh.rank)
    t = T.from_local(mine, mesh, 1)
    assert t.shape == (2, 5)
    assert t.placements == (mr.Shard(1, sizes=(4, 0, 1)),)
    assert t.gather()[0].tolist() == [0, 0, 0, 0, 2]
    with pytest.raises(mr.UsageError, match="do not fit together"):
        T.from_local(np.ones((mesh.rank + 1, 2)), mesh, 1)
    with pytest.raises(mr.UsageError, match="one number of axes"):
        T.from_local(np.ones((1,) * (mesh.rank + 1)), mesh, 0)


@on(4, (2, 2), ("a", "b"))
def test_regions(mesh: mr.DeviceMesh) -> None:
    keys: list[Any] = [
        (slice(2, 5), slice(None)),
        slice(1, 8, 3),
        (slice(None, None, -2), 3),
        (-1, -7),
        4,
        (..., slice(5, 2, -1)),
        (slice(8, 2), ...),
        (slice(0, 0), 1),
        ...,
    ]
    for placements in ({"a": 0, "b": 1}, {"b": 0}, (0, 0), None):
        t = T.shard(X, mesh, placements)
        for key in keys:
            got = t[key]
            assert got.shape == X[key].shape
            assert (got == X[key]).all()
    part = T.from_local(X, mesh, {"a": mr.Partial()}, X.shape)
    assert (part[3:5, 1] == 2 * X[3:5, 1]).all()
    for bad in ((0, 0, 0), 9, -10, (slice(None), 7), "a", [0, 1], True, (..., ...), None, 1.5):
        with pytest.raises(mr.UsageError):
            t[bad]


def test_one_rank_needs_no_communicator() -> None:
    t = T.shard(X, ALONE, {"dp": 0, "tp": 1})
    assert (t.gather() == X).all()
    assert (t[2:4, 1] == X[2:4, 1]).all()
    assert (t.redistribute({"tp": 0}).local_shard == X).all()
    assert t.sum().item() == X.sum()
    assert T.from_local(X, ALONE, {"dp": mr.Partial()}).item is not None
    assert not t.requires_communication()


def test_what_arrays_have_and_tensors_have_not_is_said() -> None:
    t = T.shard(X, ALONE, {"dp": 0})
    with pytest.raises(AttributeError, match=r"t\.gather\(\)\.reshape"):
        t.reshape(7, 9)
    assert not hasattr(t, "argsort")
    assert not hasattr(t, "nonsense")


@on(2, (2,), ("x",))
def test_copies_keep_their_communicator(mesh: mr.DeviceMesh) -> None:
    t = copy.deepcopy(T.shard(X, mesh, 0))
    assert (t.gather() == X).all()
    assert copy.copy(mesh) is mesh
    again = pickle.loads(pickle.dumps(t.sharding))
    assert again == t.sharding
    assert again.mesh.communicator is None


def test_a_big_mesh_without_a_communicator_has_no_part_here() -> None:
    with pytest.raises(mr.UsageError, match="no communicator"):
        T.shard(X, mr.DeviceMesh(2, "x"), 0)


T1 = T.shard(X, ALONE, {"dp": 0})
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a list": (lambda: T.shard([1, 2], ALONE), "numpy.asarray"),
    "a mask": (lambda: T.shard(np.ma.masked_array([1]), ALONE), "MaskedArray"),
    "partial": (lambda: T.shard(X, ALONE, {"dp": mr.Partial()}), "from_local"),
    "axis": (lambda: T.shard(X, ALONE, {"dp": 2}), "no axis 2"),
    "shape": (lambda: T.from_local(X, ALONE, None, (9, 8)), "'local_shard'"),
    "function": (lambda: T.from_function(lambda r: X[:1], (9, 7), ALONE), "'local_shard'"),
    "dtype": (lambda: T.zeros((1,), ALONE, None, "float7"), "float7"),
    "root": (lambda: T1.gather(root=3), "'root'"),
    "item": (lambda: T1.item(), "63 elements"),
    "asarray": (lambda: np.asarray(T1), "t.gather()"),
    "bool": (lambda: bool(T1), "t.gather()"),
    "float": (lambda: float(T1), "t.gather()"),
    "iteration": (lambda: list(T1), "t.gather()"),
    "assignment": (lambda: T1.__setitem__(0, 1), "t.local_shard"),
    "placements": (lambda: T1.redistribute({"ep": 0}), "'ep'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_with_a_sentence(name: str) -> None:
    call, text = REFUSED[name]
    with pytest.raises(mr.UsageError) as caught:
        call()
    assert text in str(caught.value)
