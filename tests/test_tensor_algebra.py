"""Functions of sharded tensors against NumPy's on the whole, their placements, and refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import meshring as mr

LIMIT = 20.0
T = mr.DistributedTensor
R, S0, S1 = mr.Replicate(), mr.Shard(0), mr.Shard(1)
P = mr.Partial()
RNG = np.random.default_rng(1)
A = RNG.standard_normal((9, 7))
B = RNG.standard_normal((9, 7)) + 3
ROW = RNG.standard_normal(7)
COLUMN = RNG.standard_normal((9, 1))


def same(t: mr.DistributedTensor, want: Any) -> None:
    got = t.gather()
    assert got.dtype == np.asarray(want).dtype
    assert got.shape == np.shape(want)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def mesh_of(comm: mr.Communicator) -> mr.DeviceMesh:
    return mr.DeviceMesh((2, 2), ("a", "b"), comm)


def test_elementwise_keeps_placements_and_slices_what_is_replicated() -> None:
    def program(comm: mr.Communicator) -> None:
        mesh = mesh_of(comm)
        for p in itertools.product((R, S0, S1), repeat=2):
            a, b = T.shard(A, mesh, p), T.shard(B, mesh, p)
            full = T.shard(B, mesh)
            for left, right in ((a, b), (a, full), (full, a)):
                assert (left + right).placements == a.placements
            same(a + full, A + B)
            same(full / b, B / B)
            same(np.exp(a) * 2 - b, np.exp(A) * 2 - B)
            same(a > b, A > B)
            same(a + T.shard(ROW, mesh), A + ROW)
            same(a * T.shard(COLUMN, mesh), A * COLUMN)
            same(np.where(a > 0, a, 0.0), np.where(A > 0, A, 0.0))
            same(np.clip(a, -0.5, 0.5), np.clip(A, -0.5, 0.5))
            same(np.maximum(a, np.float64(0)), np.maximum(A, 0))
            same(-(abs(a) ** 2) // 3, -(abs(A) ** 2) // 3)
            quotient, rest = np.divmod(a, b)
            same(quotient, A // B)
            same(rest, A % B)
            same(a.astype("f4"), A.astype("f4"))
            same(np.zeros_like(a) + np.ones_like(a, dtype="f8"), np.ones_like(A))

    mr.run_local(program, 4, timeout=LIMIT)


def test_in_place_and_out() -> None:
    def program(comm: mr.Communicator) -> None:
        mesh = mesh_of(comm)
        a, full = T.shard(A, mesh, {"b": 1}), T.shard(B, mesh)
        held = a.local_shard
        a -= 0.5 * full
        assert a.local_shard is held
        same(a, A - 0.5 * B)
        np.negative(a, out=a)
        same(a, 0.5 * B - A)
        with pytest.raises(mr.UsageError, match="not those of out"):
            full += a
        copied = a.copy()
        assert not np.shares_memory(copied.local_shard, a.local_shard)

    mr.run_local(program, 4, timeout=LIMIT)


@pytest.mark.parametrize("name", ["sum", "mean", "max", "min", "prod"])
def test_reductions(name: str) -> None:
    function = getattr(np, name)

    def program(comm: mr.Communicator) -> None:
        mesh = mesh_of(comm)
        for p in itertools.product((R, S0, S1, mr.Shard(0, "ceil")), repeat=2):
            for x in (A, np.arange(6).reshape(3, 2), np.ones((1, 1), "?")):
                t = T.shard(x, mesh, p)
                for axis, keep in itertools.product((None, 0, -1, (0, 1)), (False, True)):
                    if name == "mean" and x.dtype == bool:
                        continue
                    got = getattr(t, name)(axis=axis, keepdims=keep)
                    cut = [isinstance(q, mr.Shard) and axis in (None, (0, 1)) for q in t.placements]
                    assert [isinstance(q, mr.Partial) for q in got.placements] >= cut
                    same(got, function(x, axis=axis, keepdims=keep))
                same(function(t, axis=0), function(x, axis=0))

    mr.run_local(program, 4, timeout=LIMIT)


def test_reduced_axis_gives_partial_and_the_others_move_up() -> None:
    def program(comm: mr.Communicator) -> None:
        t = T.shard(A, mesh_of(comm), (S0, S1))
        assert t.sum(axis=0).placements == (P, S0)
        assert t.max(axis=1).placements == (S0, mr.Partial("max"))
        assert t.sum(axis=0, keepdims=True).placements == (P, S1)
        assert np.add.reduce(t).placements == (P, S0)
        assert t.mean().placements == (P, P)

    mr.run_local(program, 4, timeout=LIMIT)


def test_what_goes_through_a_reduction_that_is_still_to_be_done() -> None:
    def program(comm: mr.Communicator) -> None:
        mesh = mesh_of(comm)
        a = T.from_local(A * (comm.rank + 1), mesh, (P, P), A.shape)
        b = T.from_local(B, mesh, (P, P), B.shape)
        for t, want in (
            (a + b, 10 * A + 4 * B),
            (a - b, 10 * A - 4 * B),
            (-a, -10 * A),
            (a * 3, 30 * A),
            (3 * a, 30 * A),
            (a / 4, 2.5 * A),
            (a * T.shard(B, mesh), 10 * A * B),
            (a.sum(axis=0), 10 * A.sum(axis=0)),
            (a.mean(), 10 * A.mean()),
            (a.T, 10 * A.T),
        ):
            assert t.placements == (P, P)
            same(t, want)
        m = T.shard(A, mesh, {"a": 0}).max(axis=0)
        n = T.shard(B, mesh, {"a": 0}).max(axis=0)
        same(np.maximum(m, n), np.maximum(A.max(0), B.max(0)))

    mr.run_local(program, 4, timeout=LIMIT)


def test_matmul_of_tensor_parallel_layers() -> None:
    x, w = RNG.standard_normal((9, 5)), RNG.standard_normal((5, 7))

    def program(comm: mr.Communicator) -> None:
        mesh = mesh_of(comm)
        cases = {
            ((R, R), (R, S1)): (R, S1),  # column-parallel
            ((R, S1), (R, S0)): (R, P),  # row-parallel
            ((S0, S1), (R, S0)): (S0, P),  # data and row
            ((S0, R), (R, S1)): (S0, S1),  # data and column
            ((R, S1), (R, R)): (R, P),
            ((R, R), (S0, R)): (P, R),
            ((R, P), (S1, R)): (S1, P),
            ((R, R), (R, R)): (R, R),
            ((S1, S1), (S0, S0)): (P, P),
        }
        for (p, q), want in cases.items():
            a = T.from_local(x, mesh, p, x.shape) if P in p else T.shard(x, mesh, p)
            got = a @ T.shard(w, mesh, q)
            assert got.placements == want
            same(got, x @ w * (2 if P in p else 1))
        batch = np.stack([x, 2 * x])
        same(np.matmul(T.shard(batch, mesh, {"a": 0}), T.shard(w, mesh, {"b": 1})), batch @ w)
        same(np.dot(T.shard(x, mesh), T.shard(w, mesh, {"b": 1})), x @ w)
        same(T.shard(w, mesh, {"b": 1}).T @ T.shard(x, mesh, {"a": 0}).T, w.T @ x.T)

    mr.run_local(program, 4, timeout=LIMIT)


def test_transpose() -> None:
    x = RNG.standard_normal((3, 4, 5))

    def program(comm: mr.Communicator) -> None:
        t = T.shard(x, mesh_of(comm), {"a": 0, "b": 2})
        assert t.T.placements == (mr.Shard(2), S0)
        same(t.T, x.T)
        same(t.transpose(1, 0, 2), x.transpose(1, 0, 2))
        same(np.transpose(t, (2, 0, 1)), x.transpose(2, 0, 1))

    mr.run_local(program, 4, timeout=LIMIT)


def refusals(mesh: mr.DeviceMesh) -> dict[str, tuple[Callable[[], object], str]]:
    a0, a1 = T.shard(A, mesh, {"a": 0}), T.shard(A, mesh, {"a": 1})
    part = T.from_local(A, mesh, {"a": P}, A.shape)
    flat = mesh.flatten("x")
    return {
        "cut otherwise": (lambda: a0 + a1, "redistribute one"),
        "cut by another rule": (
            lambda: a0 + T.shard(A, mesh, {"a": mr.Shard(0, sizes=(3, 6))}),
            "redistribute one",
        ),
        "plain array": (lambda: a0 + A, "DistributedTensor.shard"),
        "plain array first": (lambda: A * a0, "DistributedTensor.shard"),
        "shapes": (lambda: a0 + T.shard(ROW[:3], mesh), "broadcast"),
        "meshes": (lambda: a0 + T.shard(A, flat, 0), "meshes differ"),
        "partial + number": (lambda: part + 1, "Partial axis 'a'"),
        "partial * partial": (lambda: part * part, "Partial axis 'a'"),
        "number / partial": (lambda: 1 / part, "Partial axis 'a'"),
        "exp of partial": (lambda: np.exp(part), "Partial axis 'a'"),
        "max of partial": (lambda: part.max(), "max does not go through"),
        "partial + whole": (lambda: part + T.shard(A, mesh), "Partial axis 'a'"),
        "astype of partial": (lambda: part.astype("f4"), "redistribute first"),
        "matmul rows and k": (lambda: a0 @ T.shard(A.T, mesh, {"a": 0}), "do not go together"),
        "matmul plain": (lambda: a0 @ A.T, "plain array"),
        "matmul shapes": (lambda: a0 @ a0, "(k, n)"),
        "matmul partial": (
            lambda: part @ T.from_local(A.T, mesh, {"a": P}, A.T.shape),
            "do not go together",
        ),
        "sort": (lambda: np.sort(a0), "numpy.sort"),
        "concatenate": (lambda: np.concatenate([a0, a0]), "numpy.concatenate"),
        "accumulate": (lambda: np.add.accumulate(a0), "numpy.add.accumulate"),
        "where=": (lambda: np.add(a0, a0, where=True), "numpy.add"),
        "sum out=": (lambda: np.sum(a0, out=A), "numpy"),
        "dtype=": (lambda: np.sum(a0, dtype="f4"), "'dtype'"),
        "out of another kind": (
            lambda: np.add(a0.astype("i8"), 0.5, out=a0.astype("i8")),
            "t.astype()",
        ),
        "axis": (lambda: a0.sum(axis=2), "axis 2"),
        "axes": (lambda: a0.transpose(0, 0), "permutation"),
        "max of nothing": (lambda: T.zeros((0, 3), mesh).max(axis=0), "no elements"),
        "to file": (lambda: part.to_file("never-written"), "reduction"),
    }


def test_everything_else_is_refused_with_a_sentence() -> None:
    def program(comm: mr.Communicator) -> None:
        for name, (call, text) in refusals(mesh_of(comm)).items():
            with pytest.raises(mr.UsageError) as caught:
                call()
            assert text in str(caught.value), name
        comm.barrier()

    mr.run_local(program, 4, timeout=LIMIT)
