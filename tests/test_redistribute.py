"""Redistributions that run: every pair of placements, chains, other meshes, cold paths."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import meshring as mr

LIMIT = 30.0
R, S0, S1, CEIL = mr.Replicate(), mr.Shard(0), mr.Shard(1), mr.Shard(0, "ceil")
P = mr.Partial()


def whole(*shape: int, dtype: str = "f8") -> np.ndarray:
    return np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)


def check(t: mr.DistributedTensor, x: np.ndarray) -> None:
    """This rank's part is that of x."""
    if t.mesh.rank not in t.mesh:
        assert t.local_shard is None
        return
    part = x[t.sharding.region(t.mesh.rank)]
    assert t.dtype == x.dtype
    assert t.local_shard.shape == part.shape
    assert (t.local_shard == part).all(), t


@pytest.mark.parametrize("shape", [(2, 4), (4, 2), (8,), (2, 2, 2)])
def test_all_pairs(shape: tuple[int, ...]) -> None:
    kinds = (R, S0, S1, CEIL) if len(shape) < 3 else (R, S0, S1)

    def program(comm: mr.Communicator) -> None:
        mesh = mr.DeviceMesh(shape, tuple("abc"[: len(shape)]), comm)
        for x in (whole(9, 7), whole(1, 3), whole(0, 4)):
            pairs = list(itertools.product(itertools.product(kinds, repeat=len(shape)), repeat=2))
            for source, target in pairs[:: 7 if x.size < 9 else 4 if len(shape) > 2 else 1]:
                t = mr.DistributedTensor.shard(x, mesh, source)
                check(t.redistribute(target), x)

    mr.run_local(program, 8, timeout=LIMIT)


def test_nine_elements_on_eight_ranks_none_and_one_on_four() -> None:
    for count, ranks in ((9, 8), (0, 4), (1, 4)):
        x = whole(count)

        def program(comm: mr.Communicator, x: np.ndarray = x) -> None:
            mesh = mr.DeviceMesh(comm.size, "x", comm)
            for split in ("balanced", "ceil"):
                t = mr.DistributedTensor.shard(x, mesh, mr.Shard(0, split))
                check(t, x)
                assert t.gather().tolist() == x.tolist()
                assert t.sum().gather() == x.sum()
                other = mr.Shard(0, "ceil" if split == "balanced" else "balanced")
                check(t.redistribute(other), x)

        mr.run_local(program, ranks, timeout=LIMIT)


def test_reductions_are_done_on_the_way() -> None:
    x = whole(6, 5)

    def program(comm: mr.Communicator) -> None:
        mesh = mr.DeviceMesh((2, 3), ("a", "b"), comm)
        a, b = mesh.coordinate()
        for target in itertools.product((R, S0, S1), repeat=2):
            one = mr.DistributedTensor.from_local(x * (a + 1), mesh, {"a": P}, x.shape)
            check(one.redistribute(target), x * 3)
            both = mr.DistributedTensor.from_local(x * (a + 10 * b), mesh, (P, P), x.shape)
            check(both.redistribute(target), x * (3 + 60))
            part = (x * (a + 1))[:, mr.Sharding(mesh, x.shape, {"b": 1}).region(comm.rank)[1]]
            mixed = mr.DistributedTensor.from_local(part.copy(), mesh, (P, S1), x.shape)
            check(mixed.redistribute(target), x * 3)
        for op, value in (("max", 2), ("min", 0), ("prod", 0), ("mean", 1)):
            kind = mr.Partial(op)
            t = mr.DistributedTensor.from_local(x * b, mesh, {"b": kind}, x.shape)
            want = 0 * x if op == "prod" else x * value
            check(t.redistribute({"a": 0}), want)
        scalar = mr.DistributedTensor.from_local(np.array(1.5), mesh, (P, P), ())
        assert scalar.item() == 9.0
        root = mr.DeviceMesh(1, "root", comm, ranks=[4])
        alone = scalar.redistribute(None, root)
        assert alone.local_shard is None if comm.rank != 4 else alone.local_shard == 9.0

    mr.run_local(program, 6, timeout=LIMIT)


def test_to_partial_and_back() -> None:
    x = whole(5, 4)

    def program(comm: mr.Communicator) -> None:
        mesh = mr.DeviceMesh((2, 2), ("a", "b"), comm)
        for op, source in itertools.product(
            ("sum", "prod", "min", "max", "mean"), itertools.product((R, S0), repeat=2)
        ):
            t = mr.DistributedTensor.shard(x, mesh, source)
            u = t.redistribute({"a": 1, "b": mr.Partial(op)})
            assert u.placements == (S1, mr.Partial(op))
            check(u.redistribute({"a": 0}), x)

    mr.run_local(program, 4, timeout=LIMIT)


def test_large_blocks_go_straight_into_place_and_small_ones_packed() -> None:
    def program(comm: mr.Communicator) -> None:
        mesh = mr.DeviceMesh(comm.size, "x", comm)
        for shape in ((2001, 402), (7, 5, 3), (1, 301, 402), (33, 301, 400)):
            x = whole(*shape, dtype="f4")
            axes = range(len(shape))
            for a, b in itertools.permutations(axes, 2):
                for split in ("balanced", "ceil"):
                    t = mr.DistributedTensor.shard(x, mesh, mr.Shard(a, split))
                    check(t.redistribute(mr.Shard(b)), x)
            t = mr.DistributedTensor.shard(x, mesh, 0).T
            check(t.redistribute(0), x.T)

    mr.run_local(program, 3, timeout=LIMIT)


def test_between_meshes_of_different_ranks() -> None:
    x = whole(9, 7)

    def program(comm: mr.Communicator) -> None:
        left = mr.DeviceMesh((2, 2), ("a", "b"), comm, ranks=[0, 1, 2, 3])
        right = mr.DeviceMesh(3, "c", comm, ranks=[5, 3, 4])
        for p, q in itertools.product(itertools.product((R, S0, S1), repeat=2), (R, S0, S1)):
            t = mr.DistributedTensor.shard(x, left, p)
            assert (t.local_shard is None) == (comm.rank > 3)
            u = t.redistribute(q, right)
            check(u, x)
            check(u.redistribute(p, left), x)
            assert (u.device_id is None) == (comm.rank < 3)
        t = mr.DistributedTensor.shard(x, right, 0)
        root = t.gather(root=4)
        assert (root is None) == (comm.rank != 4)

    mr.run_local(program, 6, timeout=LIMIT)


def test_a_mesh_of_some_ranks_needs_the_others_for_reductions_only() -> None:
    x = whole(6, 5)

    def program(comm: mr.Communicator) -> None:
        mesh = mr.DeviceMesh((2, 2), ("a", "b"), comm, ranks=[4, 2, 1, 3])
        assert not mesh.opened
        if comm.rank == 0:
            return
        t = mr.DistributedTensor.shard(x, mesh, (S0, S1))
        check(t.redistribute((S0, R)), x)
        check(t.redistribute((S1, S0)), x)
        check(t.redistribute(), x)
        part = t.sum(axis=0)
        with pytest.raises(mr.UsageError, match=r"mesh\.open\(\)"):
            part.redistribute()

    mr.run_local(program, 5, timeout=LIMIT)


def test_off_the_mesh_the_same_program_runs() -> None:
    x = whole(6, 5) + 1

    def program(comm: mr.Communicator) -> None:
        mesh = mr.DeviceMesh((2, 1), ("a", "b"), comm, ranks=[2, 0])
        mesh.open()
        t = mr.DistributedTensor.shard(x, mesh, {"a": 0})
        u = t @ mr.DistributedTensor.ones((5, 2), mesh)
        total = (u * 2).sum(axis=0).redistribute()
        assert (total.local_shard is None) == (comm.rank == 1)
        assert total.shape == (2,)
        if total.local_shard is not None:
            assert total.local_shard.tolist() == [2 * x.sum()] * 2
        assert t.T.shape == (5, 6)
        assert t.astype("f4").dtype == np.dtype("f4")
        assert (t.max().dtype, t.mean(axis=0).shape) == (x.dtype, (5,))

    mr.run_local(program, 3, timeout=LIMIT)


def test_partial_between_meshes() -> None:
    x = whole(4, 4)

    def program(comm: mr.Communicator) -> None:
        left = mr.DeviceMesh(2, "a", comm, ranks=[0, 1])
        right = mr.DeviceMesh(2, "a", comm, ranks=[2, 3])
        left.open()
        right.open()
        here = comm.rank < 2
        t = mr.DistributedTensor.from_local(x if here else None, left, P, x.shape, like=x)
        check(t.redistribute(1, right), 2 * x)
        u = t.redistribute(P, right)
        check(u.redistribute(R), 2 * x)

    mr.run_local(program, 4, timeout=LIMIT)


placement = st.one_of(
    st.just(R), st.builds(mr.Shard, st.integers(0, 1), st.sampled_from(["balanced", "ceil"]))
)
pair = st.tuples(placement, placement)


@settings(max_examples=40)
@given(
    st.sampled_from([(2, 2), (1, 4), (4, 1), (2, 3)]),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.lists(pair, min_size=2, max_size=5),
    st.sampled_from(["f8", "i2", "?", "c8"]),
)
def test_chains_end_where_the_direct_way_does(
    mesh_shape: tuple[int, int], shape: tuple[int, int], chain: list[Any], dtype: str
) -> None:
    x = whole(*shape, dtype=dtype)

    def program(comm: mr.Communicator) -> None:
        mesh = mr.DeviceMesh(mesh_shape, ("a", "b"), comm)
        first = mr.DistributedTensor.shard(x, mesh, chain[0])
        t = first
        for placements in chain[1:]:
            t = t.redistribute(placements)
            check(t, x)
        direct = first.redistribute(chain[-1])
        assert direct.sharding == t.sharding
        assert (direct.local_shard == t.local_shard).all()
        assert (t.gather() == x).all()

    mr.run_local(program, mesh_shape[0] * mesh_shape[1], timeout=LIMIT)


def test_nothing_is_shared_but_what_is_there_already() -> None:
    x = whole(4, 4)

    def program(comm: mr.Communicator) -> None:
        mesh = mr.DeviceMesh(2, "a", comm)
        t = mr.DistributedTensor.shard(x, mesh)
        assert not np.shares_memory(t.local_shard, x)
        assert t.redistribute(None) is t
        for u in (t.redistribute(0).local_shard, t.gather()):
            assert not np.shares_memory(u, t.local_shard)

    mr.run_local(program, 2, timeout=LIMIT)


def test_meshes_on_different_communicators_are_refused() -> None:
    def program(comm: mr.Communicator) -> None:
        with comm.split(0) as other:  # type: ignore[union-attr]
            t = mr.DistributedTensor.shard(whole(4), mr.DeviceMesh(2, "a", comm), 0)
            with pytest.raises(mr.UsageError, match="one communicator"):
                t.redistribute(None, mr.DeviceMesh(2, "b", other))

    mr.run_local(program, 2, timeout=LIMIT)


def test_what_is_remembered_keeps_no_communicator() -> None:
    seen = []

    def program(comm: mr.Communicator) -> None:
        mesh = mr.DeviceMesh((1, 2), ("a", "b"), comm)
        t = mr.DistributedTensor.shard(whole(8, 6), mesh, {"b": 0})
        u = (t + t).redistribute({"b": 1}) @ mr.DistributedTensor.ones((6, 2), mesh, {"b": 0})
        u.sum(axis=0).T.gather()
        u.redistribute({"a": 1})
        t[2:4]
        seen.append(weakref.ref(comm))

    mr.run_local(program, 2, timeout=LIMIT)
    gc.collect()
    assert [ref() for ref in seen] == [None, None]
