"""Splits, placements and shardings: every index once, right at the edges, refused with a sentence."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshring as mr

R = mr.Replicate()
MESH = mr.DeviceMesh((2, 3), ("dp", "tp"))


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 64, 100])
@pytest.mark.parametrize("parts", [1, 3, 4, 8])
def test_balanced_is_array_split_and_ceil_is_the_clamped_rule(length: int, parts: int) -> None:
    balanced = [mr.TensorPartition.of(length, parts, i, 0, "balanced") for i in range(parts)]
    expected = [len(p) for p in np.array_split(np.arange(length), parts)]
    assert [p.size for p in balanced] == expected
    chunk = -(-length // parts)
    for i in range(parts):
        p = mr.TensorPartition.of(length, parts, i)
        assert p.start_idx == min(i * chunk, length)
        assert p.end_idx == min((i + 1) * chunk, length)


def test_edges() -> None:
    def sizes(length: int, parts: int, split: str) -> list[int]:
        return [mr.TensorPartition.of(length, parts, i, 0, split).size for i in range(parts)]

    assert sizes(9, 8, "balanced") == [2, 1, 1, 1, 1, 1, 1, 1]
    assert sizes(9, 8, "ceil") == [2, 2, 2, 2, 1, 0, 0, 0]
    for split in ("balanced", "ceil"):
        assert sizes(0, 4, split) == [0, 0, 0, 0]
        assert sizes(1, 4, split) == [1, 0, 0, 0]


def test_the_seed_s_partition() -> None:
    part = mr.TensorPartition.of(128, 4, 0)
    fields = (part.split_dim, part.start_idx, part.end_idx)
    assert fields == (0, 0, 32)
    assert (part.num_partitions, part.partition_rank) == (4, 0)


def test_bounds_of_arrays_are_those_of_numbers() -> None:
    for shard in (mr.Shard(0), mr.Shard(0, "ceil"), mr.Shard(0, sizes=(2, 0, 5, 2))):
        starts, ends = shard.bounds(np.array(9), 4, np.arange(4))
        assert list(zip(starts, ends, strict=True)) == [shard.bounds(9, 4, i) for i in range(4)]


placement = st.one_of(
    st.just(R), st.builds(mr.Shard, st.integers(-2, 1), st.sampled_from(["balanced", "ceil"]))
)


@given(
    st.tuples(st.integers(0, 11), st.integers(0, 11)),
    st.tuples(placement, placement),
    st.sampled_from([(0, 1), (1, 0)]),
)
def test_regions_cover_the_tensor_as_often_as_it_is_replicated(
    shape: tuple[int, int], placements: tuple[mr.Shard, mr.Shard], order: tuple[int, int]
) -> None:
    sharding = mr.Sharding(MESH, shape, placements, order)
    count = np.zeros(shape, int)
    for rank in range(6):
        count[sharding.region(rank)] += 1
        assert count[sharding.region(rank)].shape == sharding.local_shape(rank)
    copies = [n for n, p in zip(MESH.shape, placements, strict=True) if p == R]
    assert (count == np.prod(copies, dtype=int)).all()
    for axis in range(2):  # the arrays of all ranks say the same
        starts, ends = (np.broadcast_to(c, (2, 3)) for c in sharding.cuts_by_place(axis))
        for rank in range(6):
            at = MESH.coordinate(rank)
            assert sharding.box(rank)[axis] == (starts[at], ends[at])


def test_nested_cuts_of_one_axis() -> None:
    sharding = mr.Sharding(MESH, (10,), {"dp": 0, "tp": 0})
    assert [sharding.local_shape(r) for r in range(6)] == [(2,), (2,), (1,), (2,), (2,), (1,)]
    assert sharding.partitions(4)[0] == mr.TensorPartition(0, 7, 9, 6, 4)
    turned = mr.Sharding(MESH, (10,), {"dp": 0, "tp": 0}, order=(1, 0))
    assert turned.box(1) == ((4, 6),)
    assert turned != sharding
    assert turned.partitions(1)[0].partition_rank == 2


def test_explicit_sizes() -> None:
    sharding = mr.Sharding(MESH, (7, 2), {"tp": mr.Shard(0, sizes=(4, 0, 3))})
    assert [sharding.local_shape(r)[0] for r in range(6)] == [4, 0, 3, 4, 0, 3]
    inner = mr.Sharding(MESH, (8,), {"dp": 0, "tp": mr.Shard(0, sizes=(3, 0, 1))})
    assert inner.box(3) == ((4, 7),)


def test_spellings_of_placements() -> None:
    same = [{"tp": 1}, {"tp": mr.Shard(1)}, [R, 1], (R, mr.Shard(-1))]
    assert len({mr.Sharding(MESH, (4, 4), p) for p in same}) == 1  # type: ignore[arg-type]
    assert mr.Sharding(MESH, (4,)).placements == (R, R)
    assert mr.Sharding(mr.DeviceMesh(4, "x"), (4,), 0).local_shape(3) == (1,)
    assert repr(mr.Sharding(MESH, (4, 4), {"tp": 1})) == (
        "Sharding((4, 4), {dp: Replicate(), tp: Shard(1)})"
    )


def test_a_region_of_100_000_ranks_needs_only_its_own_place() -> None:
    mesh = mr.DeviceMesh((10, 100, 100), ("pp", "dp", "tp"))
    sharding = mr.Sharding(mesh, (10**9 + 7, 64), (0, 0, 0))
    ends = 0
    for rank in (0, 1, 99_998, 99_999):
        start, end = sharding.box(rank)[0]
        assert end - start in (10_000, 10_001)
        ends = end
    assert ends == 10**9 + 7


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "axis": (lambda: mr.Sharding(MESH, (4,), {"tp": 1}), "no axis 1"),
    "axis is a string": (lambda: mr.Shard("0"), "'axis'"),  # type: ignore[arg-type]
    "split": (lambda: mr.Shard(0, "even"), "'split'"),
    "sizes negative": (lambda: mr.Shard(0, sizes=(1, -1)), "'sizes'"),
    "sizes are no integers": (lambda: mr.Shard(0, sizes=(1.5, 2)), "'sizes'"),  # type: ignore[arg-type]
    "number of sizes": (
        lambda: mr.Sharding(MESH, (4,), {"tp": mr.Shard(0, sizes=(2, 2))}),
        "length 3",
    ),
    "sum of sizes": (
        lambda: mr.Sharding(MESH, (4,), {"tp": mr.Shard(0, sizes=(2, 2, 2))}),
        "adds up to 6",
    ),
    "sizes inside uneven cuts": (
        lambda: mr.Sharding(MESH, (9,), {"dp": 0, "tp": mr.Shard(0, sizes=(2, 2, 0))}),
        "has 4 or 5 there",
    ),
    "mesh axis": (lambda: mr.Sharding(MESH, (4,), {"ep": 0}), "'ep'"),
    "number of placements": (lambda: mr.Sharding(MESH, (4,), [0]), "do not fit"),
    "no placement": (lambda: mr.Sharding(MESH, (4,), {"tp": "x"}), "'x'"),  # type: ignore[dict-item]
    "op": (lambda: mr.Partial("xor"), "'op'"),
    "mixed ops": (lambda: mr.Sharding(MESH, (4,), (mr.Partial(), mr.Partial("max"))), "mix"),
    "shape": (lambda: mr.Sharding(MESH, (-1,), None), "'shape'"),
    "part": (lambda: mr.TensorPartition.of(4, 4, 4), "partition_rank"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_with_a_sentence(name: str) -> None:
    call, text = REFUSED[name]
    with pytest.raises(mr.UsageError) as caught:
        call()
    assert text in str(caught.value)


def test_all_cuts_in_numbers() -> None:
    """Every split and nesting of a short axis, in full."""
    for length, a, b in itertools.product(range(8), ("balanced", "ceil"), ("balanced", "ceil")):
        sharding = mr.Sharding(MESH, (length,), (mr.Shard(0, a), mr.Shard(0, b)))
        owned = [i for r in range(6) for i in range(length)[sharding.region(r)[0]]]
        assert owned == list(range(length))
